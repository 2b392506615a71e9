# GPT-2 XL, fine-tuned on tiny-shakespeare. Same run as nanoGPT's file of this name.
out_dir = "out-shakespeare"
dataset = "shakespeare"
init_from = "gpt2-xl"
eval_interval = 5
eval_iters = 40
always_save_checkpoint = False  # the checkpoint of the lowest validation loss is the one that we want
wandb_project = "shakespeare"
wandb_run_name = "ft-gpt2-xl"

batch_size = 1
gradient_accumulation_steps = 32  # 32,768 tokens a step; an epoch of 301,966 is 9.2 steps
max_iters = 20
learning_rate = 3e-5
decay_lr = False
