"""Hugging Face's Trainer: accumulation, clipping, evaluation, checkpoints, resuming.

`torchrun --nproc-per-node 2 trainer.py --tsp`, or `python trainer.py`
"""

import argparse
import json

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import tspc.trainer

parser = argparse.ArgumentParser()
parser.add_argument("--tsp", action="store_true")
parser.add_argument("--steps", type=int, default=6)
parser.add_argument("--out", default="trained")
parser.add_argument("--bf16", action="store_true")
parser.add_argument("--resume", action="store_true")
args = parser.parse_args()

if args.tsp:
    tspc.trainer.register()
set_seed(0)
config = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    use_cache=False,
)
model = LlamaForCausalLM(config)
data = [{"input_ids": x, "labels": x} for x in torch.randint(0, 64, (44, 17))]


def accuracy(found):
    guessed, labels = np.argmax(found.predictions[:, :-1], -1), found.label_ids[:, 1:]
    return {"right": float((guessed == labels).mean()), "of": len(labels)}


trainer = Trainer(
    model,
    TrainingArguments(
        args.out,
        max_steps=args.steps,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        max_grad_norm=1.0,
        bf16=args.bf16,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        torch_compile_backend="tsp" if args.tsp else None,
    ),
    train_dataset=data[:32],
    eval_dataset=data[32:],
    compute_metrics=accuracy,
)
trainer.train(resume_from_checkpoint=f"{args.out}/checkpoint-4" if args.resume else None)
logged = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_right", "eval_of", "total_flos")
losses = [entry[k] for entry in trainer.state.log_history for k in logged if k in entry]
if trainer.is_world_process_zero():
    print(json.dumps(losses))
