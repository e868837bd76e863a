# Peak memory of language models: docs/language-models.md. In a folder with runs/toy, which toy.py
# makes, and with a folder gpt2, made by
#   AutoModelForCausalLM.from_config(GPT2Config()).save_pretrained("gpt2")
#   AutoTokenizer.from_pretrained("runs/toy/policy").save_pretrained("gpt2")
flags="--total-timesteps 8 --batch-size 8 --num-minibatches 4 --micro-batch-size 1"
flags="$flags --response-length 8 --eval-episodes 8 --update-epochs 1 --device cpu --amp off --runs-dir r"
for lora in "" "--lora-r 8"; do
    for model in runs/toy/policy gpt2; do
        OMP_NUM_THREADS=1 /usr/bin/time -f "$model $lora %M KiB" \
            python sppo_rlhf.py --policy-model $model $lora $flags 2>&1 | tail -n 1
    done
done
# 5dbf363, torch 2.13.0, transformers 5.23.0, Xeon with AMX, float32; GPT-2: 124,439,808 parameters
# runs/toy/policy  531316 KiB
# gpt2  5573020 KiB
# runs/toy/policy --lora-r 8 528596 KiB
# gpt2 --lora-r 8 1087612 KiB
