"""Other programs' names for our options: each is taken as the option itself, as a flag, in a --config file, and in --study.

    python train.py diffusion --train-data-dir pictures --learning-rate 1e-4      # --data, --lr

The scripts name an option once; for whose sake it has other names is said here. A class of options has those of the classes it is
derived from, too.
"""

OF = {  # dataclass of options: {field: its other names, without dashes}
    # train.py, distill.py and caption.py, as diffusers' training scripts and the source documents' scripts have them
    "Training": {
        "batch_size": ("train-batch-size",),
        "checkpoint_epochs": ("save-checkpoint-epochs",),
        "ema": ("use-ema",),
        "ema_decay": ("ema-max-decay",),
        "epochs": ("num-epochs", "num-train-epochs"),
        "grad_accum": ("gradient-accumulation-steps",),
        "lr": ("learning-rate",),
        "max_steps": ("max-train-steps",),
        "overwrite_output_dir": ("overwrite",),
        "report_to": ("logger",),
        "resume": ("resume-from-checkpoint",),
    },
    "Noise": {"min_snr": ("snr-gamma",), "offset_noise": ("noise-offset",)},
    "Adapters": {"lora_rank": ("rank",), "lora_rslora": ("use-rslora",)},
    "Common": {
        "data": ("train-data-dir", "data-dir", "image-dir", "dataset-name"),
        "max_samples": ("max-train-samples",),
        "num_workers": ("dataloader-num-workers",),
        "random_jitter": ("color-jitter",),
        "resolution": ("image-size",),
        "save_images_epochs": ("sample-epochs",),
    },
    "DiffusionConfig": {
        "beta_schedule": ("ddpm-beta-schedule", "schedule"),
        "model": ("pretrained-model-name-or-path",),
        "model_config": ("model-config-name-or-path",),
        "sample_steps": ("ddpm-num-inference-steps",),
        "vae": ("vae-checkpoint",),
    },
    # sample.py and eval.py: diffusers' pipelines, the source documents, A1111
    "Config": {
        "guidance_scale": ("cfg-scale",),
        "model": ("model-id", "diffusion-checkpoint"),
        "perturbed_layers": ("pag-applied-layers",),
        "perturbed_scale": ("pag-scale",),
        "refiner_start": ("refiner-switch-at",),
        "sigmas": ("schedule-type",),
        "steps": ("num-inference-steps", "number-inference-steps"),
        "txt": ("metadata-txt",),
    },
    "Images": {"guidance_scale": ("cfg-scale",), "prompts": ("prompts-file",), "steps": ("num-inference-steps",)},
    "Compare": {"finetuned": ("after",), "original": ("before",), "prompts": ("prompts-file",)},
    # distill.py: the source documents, and what each stage calls its models
    "Recursive": {"cfg_scale": ("guidance-scale",), "steps": ("num-inference-steps",)},
    "Transfer": {
        "eval_batch_size": ("draw-batch-size",),
        "lora": ("use-lora",),
        "lora_rank": ("lora-r", "rank"),
        "lora_targets": ("lora-target-modules",),
        "model": ("base-model-id", "student"),
        "num_images": ("num-images-to-generate",),
        "prompt_source": ("prompts",),
        "sdxl_image_dir": ("teacher-image-dir",),
        "steps": ("num-inference-steps",),
        "teacher": ("teacher-model-id",),
    },
    "FewStep": {"known_steps": ("original-inference-steps",), "model": ("teacher",)},
    # caption.py: the source document, PEFT
    "Stage": {"hf_token": ("token", "hub-token")},
    "Complete": {"model": ("model-name",)},
    "Augment": {"data_csv": ("captions",), "model": ("model-name",), "overwrite_output_dir": ("overwrite",)},
    "Synthesize": {
        "data_csv": ("captions",),
        "model": ("model-id",),
        "overwrite_output_dir": ("overwrite",),
        "steps": ("num-inference-steps",),
    },
    "Train": {
        "hf_token": ("token", "hub-token"),
        "lora_r": ("lora-rank",),
        "model_name": ("language-model",),
        "num_workers": ("dataloader-num-workers",),
        "random_jitter": ("color-jitter",),
    },
    "Inference": {"model_name": ("language-model",)},
    "Infer": {"infer_image_path": ("image",)},
}


def of(cls, name):
    """The other names of a field of a dataclass of options."""
    return next((OF[base.__name__][name] for base in cls.__mro__ if name in OF.get(base.__name__, ())), ())
