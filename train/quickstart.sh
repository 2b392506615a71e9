#!/bin/sh
# `make quickstart` after the install: a corpus, a small GPT trained on it, a picture of its loss, a sample.
set -eu

if "$PYTHON" -m train.prepare "$DATA"; then :; else
    [ $? -eq 1 ] || exit 130 # interrupted, rather than refused in a sentence
    echo "$DATA could not be fetched, so the Python standard library's sources are the corpus instead."
    DATA=stdlib_char
    "$PYTHON" -m train.prepare "$DATA"
fi
# A GPU trains nanoGPT's larger character model.
preset=quickstart
"$PYTHON" -c 'import sys, torch; sys.exit(torch.cuda.is_available())' || preset=train_shakespeare_char
out="out-$preset-$DATA"
echo "Training into $out. Ctrl-C saves and stops; make quickstart resumes from there."
"$PYTHON" -m train $preset --dataset="$DATA" --out_dir="$out" --init_from=auto --eval_sample=200
"$PYTHON" -m train.plot "$out"
echo
echo "A sample of the trained model:"
"$PYTHON" -m gpt.sample --out_dir="$out" --num_samples=1 --max_new_tokens=400
hint() { printf '  %-76s # %s\n' "$1" "$2"; }
echo
echo "The run is in $out: ckpt.pt, metrics.jsonl, loss.png. What to try next:"
hint "source .venv/bin/activate" "once in a shell"
hint "python -m gpt.sample $out --temperature=0.5" "more samples"
hint "python -m train.prepare text --input=FILE --tokenizer=char --name=mine" "a text of your own"
hint "python -m train quickstart --dataset=mine --out_dir=out-mine" "a model of it"
hint "python -m train train_shakespeare_char --dataset=$DATA --out_dir=out-larger" "minutes on a GPU"
hint "python -m train --help" "every setting"
