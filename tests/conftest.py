"""Tests run offline on a CPU. Golden files come from reference libraries, recorded outside this project."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports kernels: Triton's interpreter runs them on the CPU
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)
    torch.set_num_threads(2)
