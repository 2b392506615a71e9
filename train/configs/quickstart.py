# What `make quickstart` trains: nanoGPT's CPU preset, about two minutes on two cores.
out_dir = "out-quickstart"
dataset = "plays_char"
init_from = "auto"  # resumes an interrupted run
eval_interval = 250
eval_iters = 20
eval_sample = 200
log_interval = 10

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64

batch_size = 12
gradient_accumulation_steps = 1
max_iters = 2000
lr_decay_iters = 2000
learning_rate = 1e-3
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
