# GPT-2 (124M) on OpenWebText to a loss of about 2.85. Same run as nanoGPT's file of this name:
# torchrun --standalone --nproc_per_node=8 -m train train_gpt2
dataset = "openwebtext"
wandb_project = "owt"  # with --wandb_log; nanoGPT's file asks for wandb by itself
wandb_run_name = "gpt2-124M"

batch_size = 12
block_size = 1024
gradient_accumulation_steps = 40  # 12 x 1024 x 40 is about half a million tokens a step
max_iters = 600000  # 300B tokens
lr_decay_iters = 600000
weight_decay = 1e-1

eval_interval = 1000
eval_iters = 200
log_interval = 10
