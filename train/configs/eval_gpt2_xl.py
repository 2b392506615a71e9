# The loss of OpenAI's gpt2-xl as it is. Same evaluation as nanoGPT's file of this name.
init_from = "gpt2-xl"
batch_size = 8
eval_iters = 500
eval_only = True
