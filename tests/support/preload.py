# ruff: noqa: F401
"""What every rank of a test imports, once for all of them."""

import gc

import torch._dynamo
import torch._inductor.compile_fx
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama
import transformers.models.qwen3.modeling_qwen3

import tests.support.models
import tspc

gc.freeze()  # collections need not look through what stays
