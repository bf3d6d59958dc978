# Every target that people type has a `## ` comment; `make` alone lists them.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
MODEL  ?=
PEER   ?=
PEER_OV ?=
DAY    ?=
WEIGHTS ?=
OUT    ?= out
WORKERS ?= auto

.DEFAULT_GOAL := help
.PHONY: attack help setup demo demo-score nano world world-score world-study world-few-step world-lora world-steps world-recursive world-transfer world-narrow world-prefer world-captioner world-synthetic ablate train-tiny corel-workflow pokemon-workflow chaos study-schedulers study-guidance study-steps study-negative report-demo recursive-demo transfer-demo few-step-demo caption-demo caption-study book figures exercise solution test test-slow test-all test-gpu lint format bench bench-train bench-lora bench-caption bench-eval bench-small bench-gpu bench-host gpu-day tune \
	kernels-report clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | awk -F'\t' '{printf "  make %-17s %s\n", $$1, $$2}'

setup: $(STAMP)  ## create .venv from requirements.lock (PYTHON=python3.12 TORCH=torch for your own build)

$(STAMP): requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check "$(TORCH)"
	grep -v '^torch==' requirements.lock > $(VENV)/lock.txt
	$(PY) -m pip install -q --disable-pip-version-check -r $(VENV)/lock.txt
	touch $(STAMP)

demo: $(STAMP)  ## pictures from words with both embedded models, on any CPU, without a network
	$(PY) sample.py --overwrite --prompts-file assets/demo_prompts.txt --seed 7 --batch-size 16 --nrow 4 --labels --resize 128x128 \
		--output-dir $(OUT)/demo --output $(OUT)/demo/sheet.png
	@echo "the sheet: $(OUT)/demo/sheet.png"
	$(PY) -m assets.world.score --demo $(OUT)/demo/world.png

# Scenes, a VAE that begins with the embedded one, a small MMDiT in its latents (assets/world/TRAINING.md)
WORLD   = $(OUT)/world
$(WORLD)/scenes.tar: $(STAMP)
	test -f $@ || $(PY) -m assets.world.make $@

world: $(WORLD)/scenes.tar  ## draw 30,000 scenes of shapes and train the model that composes them (two hours on two cores)
	$(PY) train.py vae --preset world --model assets/nano --data $(WORLD)/scenes.tar --output-dir $(WORLD)/vae --resume auto
	$(PY) train.py diffusion --preset world --data $(WORLD)/scenes.tar --vae $(WORLD)/vae/model --output-dir $(WORLD)/model --resume auto

world-score: $(STAMP)  ## does it draw what it is told, also what it was never shown? by task, with intervals, and a sheet (ten minutes; MODEL=folder)
	$(PY) -m assets.world.score $(if $(MODEL),--model $(MODEL)) --output-dir $(WORLD)

world-prefer: $(STAMP)  ## it learns from its own mistakes, which the reader tells: two rounds of drawing twice and Diffusion-DPO (two hours on a core; MODEL=folder)
	$(PY) -m assets.world.prefer $(if $(MODEL),--model $(MODEL)) --output-dir $(WORLD)/preferred

world-study: $(STAMP)  ## what composition needs: short runs on close-ups of single objects that differ in one thing, three seeds each; what is learned first (six minutes a run on a core; --share divides them)
	$(PY) -m assets.world.study runs --output-dir $(OUT)/world-study
	$(PY) -m assets.world.study emergence --run $(OUT)/world-study/recipe-0 --output-dir $(OUT)/world-study

# What the small world's model is good for, on ground that can give way (minutes of one core, and what came of it: assets/world/STUDIES.md)
WFEW     = $(OUT)/world-few-step
WFEWSTEP = $(PY) distill.py few-step --model assets/world --data $(WFEW)/scenes.tar --batch-size 32 --lr 5e-4 --no-evaluate \
	--sample-every 0 --seed 1 --resume auto
WSTUDENT = $(foreach m,guidance consistency progressive dmd,--model $(m)=$(WFEW)/$(m)/model:1)
world-few-step: $(STAMP)  ## four ways to fewer steps on the small world; exact score at 1, 2, 4, 8 and 50 steps
	test -f $(WFEW)/scenes.tar || $(PY) -m assets.world.make $(WFEW)/scenes.tar --scenes 6000 --seed 3
	$(WFEWSTEP) --method guidance --max-steps 300 --output-dir $(WFEW)/guidance
	$(WFEWSTEP) --method consistency --max-steps 400 --output-dir $(WFEW)/consistency
	$(WFEWSTEP) --method progressive --first-steps 8 --max-steps 150 --output-dir $(WFEW)/progressive
	$(WFEWSTEP) --method dmd --student $(WFEW)/consistency/model --max-steps 300 --output-dir $(WFEW)/dmd
	$(PY) -m assets.world.steps --model teacher=assets/world $(WSTUDENT) --steps 1,2,4,8,50 --captions 40 --output-dir $(WFEW)

WLORA    = $(OUT)/world-lora
world-lora: $(STAMP)  ## a ninth colour from 50 pictures, as a LoRA; is the rest forgotten?
	$(PY) -m assets.world.make $(WLORA)/cyan.tar --scenes 50 --colour cyan --seed 5
	$(PY) train.py diffusion --lora --model assets/world --data $(WLORA)/cyan.tar --lora-rank 8 --lora-targets "$(WLAYERS)" --max-steps 300 \
		--batch-size 16 --lr 2e-3 --lr-warmup-steps 20 --sample-every 0 --checkpointing-steps 0 --resume auto --output-dir $(WLORA)/run
	$(PY) -m assets.world.score --colour cyan --captions 100
	$(PY) -m assets.world.score --colour cyan --captions 100 --lora $(WLORA)/run/model --output-dir $(WLORA)/cyan
	$(PY) -m assets.world.score --captions 100 --lora $(WLORA)/run/model --output-dir $(WLORA)/rest
WLAYERS  = to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out,net.0.proj,net.2

world-steps: $(STAMP)  ## exact score against steps, for two samplers and three guidance scales
	$(PY) -m assets.world.steps --model assets/world --scheduler flow_euler,flow_heun --guidance 1,3,6 --steps 2,4,8,16,32 --captions 40 --output-dir $(OUT)/world-steps

# Generations: trained on its own pictures alone, with half of them real, and on all generations so far
WREC     = $(OUT)/world-recursive
WRECURSE = $(PY) distill.py recursive --model assets/world --captions $(WREC)/scenes.tar --real $(WREC)/scenes.tar --data-root $(WREC)/data --models-root $(WREC)/models \
	--cfg-scale 4 --steps 20 --num-images 400 --gen0-images 400 --epochs 10 --batch-size 32 --lr 3e-4 --draw-batch-size 50 --no-gradient-checkpointing --no-evaluate \
	--target-gen 3 --output-dir $(WREC)
WGEN     = $(WREC)/data/sd_to_sd_cfg_4_steps_20_gen_
world-recursive: $(STAMP)  ## what is lost of the small world, generation after generation, and what slows the loss
	test -f $(WREC)/scenes.tar || $(PY) -m assets.world.make $(WREC)/scenes.tar --scenes 400 --seed 7
	$(WRECURSE)
	$(WRECURSE) --real-fraction 0.5
	$(WRECURSE) --accumulate
	$(PY) -m assets.world.look --series "real scenes" $(WREC)/scenes.tar --series alone $(WGEN)0 $(foreach g,1 2 3,$(WGEN)$(g)) \
		--series "half real" $(WGEN)0 $(foreach g,1 2 3,$(WGEN)$(g)_real_0.5) --series "all so far" $(WGEN)0 $(foreach g,1 2 3,$(WGEN)$(g)_all) --output-dir $(WREC)/look

# A smaller student: what it draws before, after the teacher's pictures, after the teacher's output on them. $(1): its folder, $(2): epochs
WTRANS   = $(OUT)/world-transfer
WNARROW  = $(OUT)/world-narrow
define world_teach
$(PY) distill.py transfer all --no-lora --model $(1)/student --teacher assets/world --prompt-source $(WTRANS)/scenes.tar --num-images 1000 \
	--sdxl-image-dir $(WTRANS)/pictures --num-evaluation-prompts 100 --steps 20 --guidance-scale 4 --method both --optimizer muon --epochs $(2) --batch-size 64 --lr 1e-3 \
	--lr-warmup-steps 0.1 --ema --ema-decay 0.99 --no-gradient-checkpointing --eval-batch-size 50 --panels 6 --output-dir $(1)/output
$(foreach m,student output/checkpoints/model output/checkpoints/online/model,$(PY) -m assets.world.score --model $(1)/$(m) --captions 100 &&) true
endef
$(WTRANS)/scenes.tar: | $(STAMP)
	$(PY) -m assets.world.make $@ --scenes 1200 --seed 9
world-transfer: $(WTRANS)/scenes.tar  ## half the depth learns from the whole: from its pictures, and from its output on them; exact score
	test -f $(WTRANS)/student/model_index.json || $(PY) -m assets.world.halve --output-dir $(WTRANS)/student
	$(call world_teach,$(WTRANS),25)

world-narrow: $(WTRANS)/scenes.tar  ## the same of half the width, fitted layer by layer before it learns
	test -f $(WNARROW)/student/model_index.json || $(PY) -m assets.world.narrow --output-dir $(WNARROW)/student
	$(call world_teach,$(WNARROW),40)

# A captioner of scenes, from scratch; then whether one with few originals is helped by synthetic ones
WCAP     = $(OUT)/world-captioner
world-captioner: $(STAMP)  ## a captioner that reads scenes (an hour on a core): exact sentences, seen and held out; captions drawn, told and drawn again
	test -f $(WCAP)/scenes.tar || $(PY) -m assets.world.make $(WCAP)/scenes.tar --scenes 120000 --seed 1 --in-order 1
	test -f $(WCAP)/scenes/titles.csv || $(PY) -m nanodiff.captionset export $(WCAP)/scenes.tar $(WCAP)/scenes
	$(PY) caption.py split --original-csv $(WCAP)/scenes/titles.csv --val-share 0.005 --test-share 0.005 --output-dir $(WCAP)/data
	$(PY) caption.py train --model-size world --optimizer muon --lr 2e-3 --lr-scheduler cosine --lr-warmup-steps 50 --adam-beta2 0.99 --batch-size 64 --max-steps 6400 \
		--mixed-precision no --projector-dropout 0 --samples 4 --max-new-tokens 24 --save-epochs 0 --resume auto --image-path $(WCAP)/scenes/images \
		--train-csv-path $(WCAP)/data/train.csv --val-csv-path $(WCAP)/data/val.csv --test-csv-path $(WCAP)/data/test.csv --output-dir $(WCAP)/captioner
	$(PY) -m assets.world.telling score --model-file $(WCAP)/captioner/checkpoints/last_checkpoint --output-dir $(WCAP)
	$(PY) -m assets.world.telling trip --model-file $(WCAP)/captioner/checkpoints/last_checkpoint --output-dir $(WCAP)

world-synthetic: $(STAMP)  ## does synthetic data help a captioner that has few originals? three seeds, exact scores, with and without the reader's filter
	$(PY) -m assets.world.synthetic --output-dir $(OUT)/world-synthetic

demo-score: $(STAMP)  ## how many of 200 captions the embedded model draws recognisably
	$(PY) -m assets.nano.score

# The four studies of the source document, on the embedded model or on MODEL=…
WITH    = $(if $(MODEL),--model $(MODEL) --prompt '$(1)',--prompt 'red apple' --prompt 'crescent moon' --prompt 'fire')
SALAD   = Fruit Salad with Fennel, Watercress, and Smoked Salt
STEAK   = Tuscan Porterhouse Steak with Red Wine-Peppercorn Jus
FLOW    = $(or $(findstring 3.5,$(MODEL)),$(findstring sd3,$(MODEL)))  # flows have their own samplers: FLOW=1 says so
DDPM    = $(if $(strip $(FLOW)),,scheduler=ddpm;)
BOTH    = $(if $(strip $(FLOW)),flow_euler$(,)flow_heun,ddpm$(,)ddim)
,       = ,
BAD     = blurry,unrealistic,low resolution, overexposed, unnatural colors

study-schedulers: $(STAMP)  ## DDPM against DDIM (SD 3.5: its two), the same noise (MODEL=folder or Hub id; OUT=folder)
	$(PY) sample.py $(call WITH,$(SALAD)) --seed 0 --output-dir $(OUT)/study-schedulers --study "scheduler=$(BOTH)"

study-guidance: $(STAMP)  ## guidance 1, 3, 5, 7.5, 10, 15 under both
	$(PY) sample.py $(call WITH,$(STEAK)) --seed 0 --output-dir $(OUT)/study-guidance \
		--study "scheduler=$(BOTH);guidance_scale=1,3,5,7.5,10,15"

study-steps: $(STAMP)  ## 5, 25, 50, 75, 100, 150 steps
	$(PY) sample.py $(call WITH,Almond Horchata) --seed 0 --output-dir $(OUT)/study-steps \
		--study "$(DDPM)steps=5,25,50,75,100,150"

study-negative: $(STAMP)  ## with and without a negative prompt
	$(PY) sample.py $(call WITH,$(SALAD)) --seed 0 --output-dir $(OUT)/study-negative \
		--study '$(DDPM)negative_prompt=none,"$(BAD)"'

nano: $(STAMP)  ## draw the data (by the font of the Debian package fonts-noto-color-emoji) and train the embedded model again (an hour and a half on two cores)
	mkdir -p $(OUT)
	$(PY) assets/emoji/make.py --all $(OUT)/all.tar
	$(PY) train.py vae --data $(OUT)/all.tar --preset nano --output-dir $(OUT)/nano-vae --resume auto
	$(PY) train.py diffusion --data assets/emoji/emoji.tar --preset nano --vae $(OUT)/nano-vae/model \
		--output-dir $(OUT)/nano --resume auto

ablate: $(STAMP)  ## what the embedded model's recipe owes to its parts: short runs, a table, curves (an hour)
	$(PY) -m assets.nano.ablate --output-dir $(OUT)/ablate

train-tiny: $(STAMP)  ## VAE, then diffusion, then samples, on 32 of the embedded pictures (under 5 minutes on two cores)
	$(PY) train.py vae --data assets/emoji/emoji.tar --preset nano --max-steps 380 --lr 2e-3 --sample-every 190 --overwrite-output-dir \
		--output-dir $(OUT)/train-tiny/vae
	$(PY) train.py diffusion --data assets/emoji/emoji.tar --max-samples 32 --preset nano --vae $(OUT)/train-tiny/vae/model \
		--max-steps 640 --batch-size 24 --lr-warmup-steps 50 --sample-every 160 --ema-decay 0.99 --overwrite-output-dir \
		--output-dir $(OUT)/train-tiny/model
	$(PY) sample.py --overwrite --model $(OUT)/train-tiny/model/model --prompt cyclone --prompt 'shooting star' --prompt sunflower --prompt 'maple leaf' \
		--seed 1 --resize 128x128 --labels --nrow 4 --output-dir $(OUT)/train-tiny --output $(OUT)/train-tiny/sheet.png
	@echo "how it learned: $(OUT)/train-tiny/model/samples/progress.gif; the sheet: $(OUT)/train-tiny/sheet.png"

# The document's four commands, on drawn stand-ins in the Corel layout. COREL=folder: your own; QUICK= : at full length
COREL  ?= $(OUT)/corel/data
QUICK  ?= --resolution 64 --num-workers 2
corel-workflow: $(STAMP)  ## prepare, train the VAE, train diffusion in its latents, generate (COREL=folder of XXXX_YYYY.png)
	test -d $(COREL) || $(PY) -m nanodiff.corel stand-in $(COREL)
	$(PY) -m nanodiff.data prepare-corel --data-dir $(COREL) --output-dir $(OUT)/corel/training_data --figs-dir $(OUT)/corel/figs
	$(PY) train.py corel-vae --data-dir $(OUT)/corel/training_data/corel_all --output-dir $(OUT)/corel/vae_models \
		--no-perceptual $(QUICK) $(if $(QUICK),--epochs 40 --kl-warmup 10 --lr 1e-3 --kl-target 60) --overwrite-output-dir
	$(PY) train.py corel-diffusion --vae-checkpoint $(OUT)/corel/vae_models/best_model.pt \
		--image-dir $(OUT)/corel/training_data/corel_all --output-dir $(OUT)/corel/diffusion_models $(QUICK) \
		$(if $(QUICK),--epochs 200 --lr 1e-3 --save-images-epochs 50 --checkpoint-epochs 50 --early-stopping-patience 0 --oscillation-window 0) \
		--overwrite-output-dir
	$(PY) sample.py corel --overwrite --diffusion-checkpoint $(OUT)/corel/diffusion_models/best_model.pt \
		--vae-checkpoint $(OUT)/corel/vae_models/best_model.pt --num-images 16 --ddim-steps 50 --nrow 4 --seed 1 \
		--output-dir $(OUT)/corel/generated --output $(OUT)/corel/corel_generated.png

# The document's command; TEXT= another frozen text encoder (folder or Hub id), MORE= further flags
TEXT   ?= openai/clip-vit-large-patch14
pokemon-workflow: $(STAMP)  ## the Pokémon script's command in one process: DATA=an image folder with metadata.jsonl, or parquet files
	$(PY) train.py pokemon --text-encoder $(TEXT) --train_data_dir "$(DATA)" --resolution=32 --output_dir=$(OUT)/pokemon \
		--train_batch_size=3 --dataloader_num_workers=4 --eval_batch_size=1 --num_epochs=20000000 --use_ema \
		--gradient_accumulation_steps=4 --learning_rate=1e-4 --lr_warmup_steps=1000 --mixed_precision="no" --save_images_epoch=7 \
		--ddpm_beta_schedule="squaredcos_cap_v2" --checkpointing_steps=2000 --resume_from_checkpoint="latest" \
		--prediction_type="sample" --logger="none" --image_column="image" --caption_column="text" $(MORE)

chaos: $(STAMP)  ## a short run, killed at 50 random moments and resumed each time, ends in the undisturbed run's bytes
	$(PY) -m tests.chaos --kills 50 --output-dir $(OUT)/chaos

# Everything eval.py does, on what the embedded model draws. Without WEIGHTS= (a folder, see `eval.py images --help`) distances are
# taken on 16x16 colour pixels, and what needs a network is said to be missing.
DEMO    = $(OUT)/report-demo
FEATURES = $(if $(WEIGHTS),inception$(,)pixels --weights-dir $(WEIGHTS),pixels)
report-demo: $(STAMP)  ## numbers, figures and a report on the embedded model, offline (WEIGHTS=folder for FID and CLIP score)
	for steps in 3 6 25; do $(PY) sample.py --overwrite --prompts-file assets/demo_prompts.txt --num-images 4 --batch-size 16 --seed 7 --steps $$steps \
		--output-dir $(DEMO)/steps-$$steps || exit 1; done
	$(PY) eval.py images --generated $(DEMO)/steps-3 --generated $(DEMO)/steps-6 --generated $(DEMO)/steps-25 --real assets/emoji/emoji.tar \
		--features $(FEATURES) --output-dir $(DEMO)/images
	$(PY) eval.py compare --original $(DEMO)/steps-3 --finetuned $(DEMO)/steps-6 --teacher $(DEMO)/steps-25 --panels 4 \
		$(if $(WEIGHTS),--weights-dir $(WEIGHTS)) --output-dir $(DEMO)/compare
	$(PY) eval.py captions --candidates $(DEMO)/images/nearest_pixels_steps_25.json --references $(DEMO)/images/prompts_steps_25.json \
		--output-dir $(DEMO)/captions
	$(PY) eval.py report --inputs $(DEMO)/images --inputs $(DEMO)/compare --inputs $(DEMO)/captions --title "The embedded model" \
		--output-dir $(DEMO)/report
	@echo "the reports: $(DEMO)/*/report.html"

# A model taught by its own pictures; what is lost is seen in the table, the curves and the sheet of generations
RECURSIVE = --model assets/nano --captions assets/emoji/emoji.tar --real assets/emoji/emoji.tar --data-root $(OUT)/recursive-demo/data \
	--models-root $(OUT)/recursive-demo/models --output-dir $(OUT)/recursive-demo --cfg-scale 3 --steps 10 --num-images 96 --gen0-images 96 \
	--epochs 10 --batch-size 16 --lr 5e-4 --draw-batch-size 16 --no-gradient-checkpointing --features pixels
recursive-demo: $(STAMP)  ## generation after generation on its own pictures: the embedded model loses its way (minutes, on a CPU)
	$(PY) distill.py recursive $(RECURSIVE) --target-gen 4
	@echo "the report: $(OUT)/recursive-demo/cfg_3/report.html"

# A student of half the width, trained a little, learns 64 words from the embedded model: from its pictures, and from its output on them
TRANSFER = $(OUT)/transfer-demo
transfer-demo: $(STAMP)  ## teacher to student: before, after, by two methods, with tests (a quarter of an hour, on a CPU)
	$(PY) train.py diffusion --data assets/emoji/emoji.tar --vae assets/nano --text-encoder assets/nano --model-config assets/nano/half.json \
		--max-steps 400 --batch-size 24 --lr 1e-3 --lr-warmup-steps 50 --ema-decay 0.99 --resume auto --output-dir $(TRANSFER)/student
	$(PY) distill.py transfer all --model $(TRANSFER)/student/model --teacher assets/nano --prompt-source assets/nano/concepts.txt \
		--num-images 192 --num-evaluation-prompts 64 --steps 12 --guidance-scale 3 \
		--method both --feature-weight 0.1 --epochs 30 --batch-size 16 --lr 2e-3 --lr-warmup-steps 0.1 --lora-rank 32 --lora-alpha 32 \
		--lora-dropout 0 --lora-targets "to_q,to_k,to_v,to_out.0,proj,net.2,conv1,conv2" --no-gradient-checkpointing --eval-batch-size 20 \
		--panels 6 --output-dir $(TRANSFER)/output
	@echo "the report: $(TRANSFER)/output/visualization/report.html"

FEW      = $(OUT)/few-step-demo
FEWSTEP  = $(PY) distill.py few-step --model assets/nano --data assets/emoji/emoji.tar --guidance-scale 3 --caption-dropout 0.5 --batch-size 16 \
	--lr 2e-4 --no-evaluate --seed 1
few-step-demo: $(STAMP)  ## four ways to fewer steps, each on the embedded model; quality against steps (an hour, on a CPU)
	$(FEWSTEP) --method guidance --max-steps 400 --output-dir $(FEW)/guidance
	$(FEWSTEP) --method consistency --max-steps 600 --output-dir $(FEW)/consistency
	$(FEWSTEP) --method progressive --first-steps 8 --max-steps 250 --output-dir $(FEW)/progressive
	$(FEWSTEP) --method dmd --student $(FEW)/consistency/model --max-steps 500 --output-dir $(FEW)/dmd
	$(PY) -m assets.nano.steps --student guidance=$(FEW)/guidance/model --student consistency=$(FEW)/consistency/model \
		--student progressive=$(FEW)/progressive/model --student dmd=$(FEW)/dmd/model --output-dir $(FEW)

# The captioner's whole chain on the embedded pictures: captions varied by a language model that has read the training captions alone, drawn by the
# embedded model, split, learned from, judged on pictures that none of it has seen; and what a caption becomes when it is drawn and told
CAPTION = $(OUT)/caption-demo
SMALLER = --model-size nano --batch-size 32 --lr 2e-3 --adam-beta2 0.99 --lr-warmup-steps 0.05 --optimizer adamw --lr-scheduler cosine \
	--random-flip --random-jitter 0.1 --samples 3 --max-new-tokens 16 --save-epochs 0 --resume auto --image-path $(CAPTION)/emoji/images
caption-demo: $(STAMP)  ## captions to pictures to a captioner, end to end, and back (minutes, on a CPU)
	test -f $(CAPTION)/emoji/titles.csv || $(PY) -m nanodiff.captionset export assets/emoji/emoji.tar $(CAPTION)/emoji
	$(PY) caption.py split --original-csv $(CAPTION)/emoji/titles.csv --output-dir $(CAPTION)/outer
	$(PY) caption.py train $(SMALLER) --train-csv-path $(CAPTION)/outer/train.csv --val-csv-path $(CAPTION)/outer/val.csv --max-steps 500 \
		--output-dir $(CAPTION)/first
	$(PY) caption.py augment --data-csv $(CAPTION)/outer/train.csv --model $(CAPTION)/first/checkpoints/last_checkpoint/llm --variations 1 --attempts 8 \
		--template 'Image:.The description of the given image is: {first}' --temperature 1 --top-p 0.95 --max-new-tokens 12 --min-words 1 \
		--batch-size 32 --output-dir $(CAPTION)/synthetic
	$(PY) caption.py synthesize --model assets/nano --template '{caption}' --negative-prompt '' --scheduler ddim --steps 12 --guidance-scale 3 \
		--resize none --format png --batch-size 32 --output-dir $(CAPTION)/synthetic
	$(PY) caption.py split --original-csv $(CAPTION)/outer/train.csv --synthetic-csv $(CAPTION)/synthetic/synthetic_captions.csv \
		--image-path $(CAPTION)/emoji/images --image-path $(CAPTION)/synthetic/images --output-dir $(CAPTION)/inner
	$(PY) caption.py train $(SMALLER) --image-path $(CAPTION)/synthetic/images --train-csv-path $(CAPTION)/inner/train.csv \
		--val-csv-path $(CAPTION)/inner/val.csv --max-steps 1000 --output-dir $(CAPTION)/captioner
	$(PY) caption.py eval --model-file $(CAPTION)/captioner/checkpoints/last_checkpoint --test-csv-path $(CAPTION)/outer/test.csv \
		--image-path $(CAPTION)/emoji/images --max-new-tokens 16 --output-dir $(CAPTION)/eval
	$(PY) caption.py infer --model-file $(CAPTION)/captioner/checkpoints/last_checkpoint --infer-image-path $(CAPTION)/synthetic/images \
		--max-new-tokens 16 --batch-size 64 --output-dir $(CAPTION)/told > $(CAPTION)/told.tsv
	$(PY) -m assets.nano.captions trip --model-file $(CAPTION)/captioner/checkpoints/last_checkpoint --output-dir $(CAPTION)
	@echo "held-out pictures: $(CAPTION)/eval/report.html; there and back: $(CAPTION)/trip.png"

book: $(STAMP)  ## the book as one page that needs no network (docs/book/)
	$(PY) -m docs.book.make --output $(OUT)/book/book.html

figures: $(STAMP)  ## draw the book's figures and compute its numbers anew
	$(PY) -m docs.book.figures
	$(PY) -m docs.book.papers > docs/papers.md

exercise: $(STAMP)  ## N=3: the book's exercises of chapter 3, first their skeletons, then their tests
	$(PY) -m docs.book.exercise $(N)

solution: $(STAMP)  ## N=3: where the project has its own solutions
	$(PY) -m docs.book.exercise $(N) --solution

caption-study: $(STAMP)  ## does synthetic data help a captioner? three seeds, originals alone, with one and with three drawings each (half an hour)
	$(PY) -m assets.nano.captions study --output-dir $(OUT)/caption-study

# a hundred processes of the tests' own import us: let the first keep what it compiles
test test-slow test-all: export PYTHONDONTWRITEBYTECODE =
test: $(STAMP)  ## the tests, offline, on a CPU (WORKERS=0: in one process)
	$(PY) -m pytest -n $(WORKERS) --dist worksteal

test-slow: $(STAMP)  ## the tests that take minutes each: every kernel compiled, runs killed and started again and again
	$(PY) -m pytest -n $(WORKERS) --dist worksteal -m slow

test-all: $(STAMP)  ## both
	$(PY) -m pytest -n $(WORKERS) --dist worksteal -m 'not gpu'

attack: $(STAMP)  ## 2,000 mutated weights, configs, captions, shards and pictures: refused in a line or read as they are (CASES=, SEED=)
	$(PY) -m tests.attack --cases $(or $(CASES),2000) --seed $(or $(SEED),0)

test-gpu: $(STAMP)  ## the tests that need a CUDA device, without fp32 heads of 96 to 256 (pytest -m gpu: those too, minutes more)
	$(PY) benchmarks/gpu_day.py --out $(OUT)/gpu --only tests

lint: $(STAMP)  ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(STAMP)  ## ruff: mend what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(STAMP)  ## speed against diffusers, in one run (PEER=python of an environment that has it; PEER_OV=one with OpenVINO)
	$(PY) benchmarks/bench.py --peer "$(PEER)" --peer-ov "$(PEER_OV)"

bench-train: $(STAMP)  ## whole training runs beside diffusers' own loop: images a second, memory, quality (PEER=…)
	$(PY) benchmarks/recipe.py --peer "$(PEER)"

bench-lora: $(STAMP)  ## a LoRA step of SD 1.5's whole UNet beside peft and diffusers: time and memory (PEER=…)
	$(PY) benchmarks/lora.py --peer "$(PEER)"

bench-caption: $(STAMP)  ## a language model and a captioner's step beside transformers and peft: tokens/s, loading, memory (PEER=…)
	$(PY) benchmarks/captioner.py --peer "$(PEER)"

bench-eval: $(STAMP)  ## FID beside torch-fidelity and pytorch-fid, SSIM and pHash beside scikit-image and imagehash (PEER=…)
	$(PY) benchmarks/evaluation.py --peer "$(PEER)"

bench-small: $(STAMP)  ## the quick part of it, printed only: import, a call of a test model (what CI reports)
	$(PY) benchmarks/bench.py --peer "$(PEER)" --cases import,tiny --pairs 3 --name ""

gpu-day: $(STAMP)  ## everything that a GPU is wanted for, most important first, in calls of six minutes (OUT=…, DAY='--dry', PEER=…)
	$(PY) benchmarks/gpu_day.py --out $(OUT)/gpu $(if $(PEER),--peer "$(PEER)") $(DAY)

bench-gpu: $(STAMP)  ## our kernels beside PyTorch's, on a GPU (a minute; every shape and direction: python -m kernels.bench)
	$(PY) benchmarks/gpu_day.py --out $(OUT)/gpu --only facts kernels

bench-host: $(STAMP)  ## what the host does for a call of a kernel, without a GPU: microseconds beside torch.add's
	$(PY) benchmarks/host.py

tune: $(STAMP)  ## measure the kernels' tiles on this GPU and write kernels/table.json (a minute)
	$(PY) benchmarks/gpu_day.py --out $(OUT)/gpu --only tune

kernels-report: $(STAMP)  ## compile every kernel without a GPU: registers, shared memory, spills
	$(PY) -m kernels.report --check

clean:  ## remove .venv, caches and out/
	rm -rf $(VENV) $(OUT) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
