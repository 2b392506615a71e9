# The loss of OpenAI's gpt2 as it is. Same evaluation as nanoGPT's file of this name.
init_from = "gpt2"
batch_size = 8
eval_iters = 500
eval_only = True
