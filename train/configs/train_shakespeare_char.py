# A small GPT over the characters of tiny-shakespeare: minutes on one GPU. As nanoGPT's file of this name.
out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"
eval_interval = 250  # often, because it overfits
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # the checkpoint of the lowest validation loss is the one that we want
wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.2

batch_size = 64
gradient_accumulation_steps = 1
max_iters = 5000
lr_decay_iters = 5000
learning_rate = 1e-3  # small networks take more
min_lr = 1e-4
beta2 = 0.99  # few tokens a step, so a longer memory
warmup_iters = 100
