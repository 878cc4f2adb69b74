#!/usr/bin/env bash
# Repeats what is behind a figure of README, of a card or of docs/experiments.md. docs/reproducing.md says what each name
# takes, what it gives, and how far the figure moves.
#
#     benchmarks/evidence.sh NAME [more flags of its command]
#
# What is made lies in $OUT, runs/evidence unless set; committed results stay as they are. Some names need images, a
# local `datasets` folder or a Hub id each: CIFAR10, BCCD, NUCLEI, EMOJI.
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-runs/evidence}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
name=${1:-}
[ $# -eq 0 ] || shift

images() {
    [ -n "${!1:-}" ] && return
    echo "error: \`$1\`: expected in the environment where its images are, a local datasets folder or a Hub id, found none" >&2
    exit 2
}
pretrain() { "$PYTHON" -m hf_vicreg.cli pretrain "$@"; }

case "$name" in
digits) pretrain digits --config digits --output_dir "$OUT/digits" "$@" ;;
cifar10_cpu)
    images CIFAR10
    pretrain "$CIFAR10" --config cifar10_cpu --output_dir "$OUT/cifar10_cpu" "$@" ;;
cifar10_cpu_long)
    images CIFAR10
    here="$OUT/cifar10_cpu_long"
    pretrain "$CIFAR10" --config cifar10_cpu_long --output_dir "$here/first" "$@"
    pretrain "$CIFAR10" --config cifar10_cpu_long --model_name_or_path "$here/first" --num_train_epochs 8 --learning_rate 1e-3 \
        --expander_warmup_ratio 0.04 --knn_every_epochs 2 --output_dir "$here/second" "$@"
    pretrain "$CIFAR10" --config cifar10_cpu_long --model_name_or_path "$here/second" --num_train_epochs 9 --learning_rate 1e-3 \
        --expander_warmup_ratio 0.04 --knn_every_epochs 3 --seed 1 --output_dir "$here/third" "$@"
    pretrain "$CIFAR10" --config cifar10_cpu_long --model_name_or_path "$here/third" --num_train_epochs 8 --learning_rate 1e-3 \
        --expander_warmup_ratio 0.04 --knn_every_epochs 4 --seed 2 --output_dir "$here/fourth" "$@"
    for what in knn linear; do
        "$PYTHON" -m hf_vicreg.cli evaluate "$what" "$here/fourth" --dataset_name "$CIFAR10"
    done ;;
student)
    images CIFAR10
    half=(--config cifar10_cpu --max_train_samples 20000 --model.image_size 24 --model.hidden_size 64
        --model.num_attention_heads 2 --model.intermediate_size 192)
    for seed in 0 1 2; do
        pretrain "$CIFAR10" "${half[@]}" --seed "$seed" --max_steps 914 --knn_every_epochs 0 --ema_decay 0.99 \
            --output_dir "$OUT/student/alone-seed$seed" "$@"
        pretrain "$CIFAR10" "${half[@]}" --seed "$seed" --max_steps 706 --knn_every_epochs 0 --teacher cifar10_cpu \
            --output_dir "$OUT/student/taught-seed$seed" "$@"
    done ;;
attention) "$PYTHON" -m benchmarks.attention --out "$OUT/attention.json" --plot "$OUT/attention.png" "$@" ;;
vicreg_loss) "$PYTHON" -m benchmarks.vicreg_loss --repeats 3 --out "$OUT/vicreg_loss.json" --plot "$OUT/vicreg_loss.png" "$@" ;;
throughput) "$PYTHON" -m benchmarks.throughput --threads 2 --out "$OUT/throughput.json" "$@" ;;
masked) "$PYTHON" -m benchmarks.masked --batch_size 1 --repeats 5 --out "$OUT/masked.json" "$@" ;;
checkpoints) "$PYTHON" -m benchmarks.checkpoints --steps 82 --out "$OUT/checkpoints.json" "$@" ;;
many_images) "$PYTHON" -m benchmarks.many_images --out "$OUT/many_images.json" "$@" ;;
vector_index) "$PYTHON" -m benchmarks.vector_index --output "$OUT/vector_index.json" "$@" ;;
explorer) "$PYTHON" -m benchmarks.explorer --output "$OUT/explorer.json" "$@" ;;
scaling) "$PYTHON" -m benchmarks.scaling --out "$OUT/scaling.json" "$@" ;;
planned_memory) "$PYTHON" -m benchmarks.planned_memory "$@" ;;
ablations)
    images CIFAR10
    "$PYTHON" -m benchmarks.ablations --dataset_name "$CIFAR10" --out "$OUT/ablations.json" "$@" ;;
distant_marks) "$PYTHON" -m benchmarks.distant_marks --out "$OUT/distant_marks.json" "$@" ;;
sparse_against_dense)
    images BCCD
    "$PYTHON" -m benchmarks.sparse_against_dense --dataset_name "$BCCD" --output_dir "$OUT/sparse_against_dense" \
        --steps 20 --out "$OUT/sparse_against_dense.json" "$@" ;;
emoji)
    images EMOJI
    "$PYTHON" -m benchmarks.emoji "$EMOJI" "$OUT/emoji_images"
    pretrain "$OUT/emoji_images" --config benchmarks/emoji.yaml --output_dir "$OUT/emoji" "$@"
    "$PYTHON" -m hf_vicreg.cli evaluate image-text "$OUT/emoji" --dataset_name "$EMOJI" --image_column_name image \
        --caption_column caption --second_image_column_name other_image ;;
emoji_rivals)
    images EMOJI
    here="$OUT/emoji_rivals"
    test=(--dataset_name "$EMOJI" --image_column_name image --caption_column caption --second_image_column_name other_image)
    "$PYTHON" -m benchmarks.emoji "$EMOJI" "$OUT/emoji_images"
    for seed in 0 1 2; do
        for loss in vicreg infonce; do
            length=374
            [ $loss = vicreg ] || length=367  # as many as the same time holds
            pretrain "$OUT/emoji_images" --config benchmarks/emoji.yaml --vicreg.pair_loss $loss --max_steps $length \
                --seed $seed --output_dir "$here/$loss-seed$seed" "$@"
            "$PYTHON" -m hf_vicreg.cli evaluate image-text "$here/$loss-seed$seed" "${test[@]}"
        done
    done ;;
class_names)
    images CIFAR10
    here="$OUT/class_names"
    "$PYTHON" -m benchmarks.class_captions --dataset_name "$CIFAR10" --out "$OUT/class_captions"
    pretrain "$OUT/class_captions" --config benchmarks/class_names.yaml --output_dir "$here" "$@"
    "$PYTHON" -m hf_vicreg.cli evaluate image-text "$here" --dataset_name "$CIFAR10" --label_column_name label \
        --templates "a photo of a {}"
    "$PYTHON" -m hf_vicreg.cli evaluate linear "$here/image_encoder" --dataset_name "$CIFAR10" \
        --output_dir "$here/linear" ;;
local_features)
    images NUCLEI
    for seed in 0 1 2; do
        for objective in vicreg vicregl; do
            here="$OUT/local_features/$objective-seed$seed"
            pretrain "$NUCLEI" --image_column_name image --config benchmarks/nuclei.yaml --objective $objective \
                --max_steps 100 --seed $seed --output_dir "$here" "$@"
            "$PYTHON" -m hf_vicreg.cli evaluate dense "$here" --dataset_name "$NUCLEI" --image_column_name image \
                --mask_column_name instances --instances --image_height 128 --image_width 128 --max_train_samples 100 \
                --max_test_samples 30
        done
    done ;;
dense_source)
    images CIFAR10 && images NUCLEI
    here="$OUT/dense_source"
    shape=(--model.hidden_size 128 --model.num_hidden_layers 4 --model.num_attention_heads 4 --model.intermediate_size 384
        --model.initializer_range 0.06 --model.image_size 32 --model.patch_size 4)
    pretrain "$CIFAR10" --config cifar10_cpu_long --model.model_type vit "${shape[@]}" --learning_rate 3e-3 --max_steps 1600 \
        --knn_every_epochs 4 --output_dir "$here/dense" "$@"
    "$PYTHON" -m hf_vicreg.cli convert "$here/dense" "$here/sparse" --attention_type block_sparse --tile_size 2
    "$PYTHON" -m hf_vicreg.cli convert "$here/dense" "$here/adapted" --tile_size 2 --adapt "$CIFAR10" --time_budget 14m
    short=(--image_column_name image --batch_size 128 --max_steps 150 --knn_every_epochs 0 --learning_rate 3e-3
        --expander_lr_scale 0.1 --warmup_ratio 0.1 --vicreg.expander_sizes "[1024, 1024, 1024]"
        --vicreg.invariance_weight 10 --vicreg.variance_weight 10 --views.image_size 48 --views.crop_min_ratio 0.03
        --views.blur_probability 0 --views.solarize_probability 0 --views.vertical_flip_probability 0.5
        --views.quarter_turn_probability 0.75)
    pretrain "$NUCLEI" --model_name_or_path "$here/sparse" "${short[@]}" --output_dir "$here/continued"
    pretrain "$NUCLEI" "${shape[@]}" --model.pooling cls --model.pooler_act tanh --model.position_embedding_type absolute \
        --model.layer_norm_eps 1e-12 --model.tile_size 2 --model.num_random_blocks 2 "${short[@]}" \
        --output_dir "$here/new_weights"
    for seed in 0 1 2; do
        for start in continued new_weights; do
            "$PYTHON" -m hf_vicreg.cli finetune segmentation "$here/$start" --dataset_name "$NUCLEI" \
                --image_column_name image --mask_column_name instances --instances --image_height 128 --image_width 128 \
                --quarter_turns --batch_size 8 --max_steps 100 --max_test_samples 40 --seed "$seed" \
                --output_dir "$here/segmenter-$start-seed$seed"
        done
    done ;;
planted)
    images CIFAR10 && images EMOJI && images NUCLEI
    "$PYTHON" -m benchmarks.planted "$CIFAR10" --odd "$EMOJI" "$NUCLEI" --draws 10 --out "$OUT/planted.json" "$@" ;;
nuclei)
    images NUCLEI
    pretrain "$NUCLEI" --image_column_name image --config benchmarks/nuclei.yaml --output_dir "$OUT/nuclei" "$@"
    "$PYTHON" -m hf_vicreg.cli evaluate dense "$OUT/nuclei" --dataset_name "$NUCLEI" --image_column_name image \
        --mask_column_name instances --instances --image_height 128 --image_width 128 --max_train_samples 100 \
        --max_test_samples 30
    for seed in 0 1 2; do
        for start in "" --from_scratch; do
            "$PYTHON" -m hf_vicreg.cli finetune segmentation "$OUT/nuclei" --dataset_name "$NUCLEI" --image_column_name image \
                --mask_column_name instances --instances --image_height 128 --image_width 128 --quarter_turns \
                --batch_size 8 --max_steps 100 --max_test_samples 60 --seed "$seed" $start \
                --output_dir "$OUT/nuclei_segmenter$start-seed$seed"
        done
    done ;;
bccd)
    images BCCD
    here="$OUT/bccd"
    "$PYTHON" -m benchmarks.bccd "$BCCD" "$here/images"
    pretrain "$here/images" --config benchmarks/bccd.yaml --output_dir "$here/encoder"
    for start in "" --from_scratch; do
        "$PYTHON" -m hf_vicreg.cli finetune detection "$here/encoder" $start --dataset_name "$BCCD" --image_column_name image \
            --image_height 192 --image_width 256 --d_model 128 --batch_size 8 --learning_rate 1e-3 \
            --encoder_learning_rate_ratio 1 --max_steps 350 --output_dir "$here/detector$start" "$@"
    done ;;
equal_minutes)
    images CIFAR10
    here="$OUT/equal_minutes"
    resnet18=(--model.model_type resnet --model.embedding_size 64 --model.hidden_sizes "[64, 128, 256, 512]"
        --model.depths "[2, 2, 2, 2]" --model.layer_type basic --views.image_size 32)
    # as many steps as eight minutes held
    pretrain "$CIFAR10" --config cifar10_cpu --max_steps 200 --knn_every_epochs 0 --output_dir "$here/bigbird" "$@"
    pretrain "$CIFAR10" --config cifar10_cpu "${resnet18[@]}" --max_steps 87 --knn_every_epochs 0 \
        --output_dir "$here/resnet18" "$@"
    for arm in resnet18 bigbird; do
        "$PYTHON" -m benchmarks.lightly_training $arm --dataset_name "$CIFAR10" --seconds 480 --out "$here/lightly-$arm.json"
    done ;;
high_resolution)
    images NUCLEI
    here="$OUT/high_resolution"
    "$PYTHON" -m benchmarks.high_resolution --dataset_name "$NUCLEI" --out "$here"
    for seed in 0 1 2; do
        for run in sparse-46 dense-7 sparse-7; do  # the first two take the same time
            "$PYTHON" -m hf_vicreg.cli finetune segmentation "$here/${run%-*}" --dataset_name "$here/images" \
                --image_column_name image --mask_column_name instances --instances --image_height 512 --image_width 512 \
                --quarter_turns --decoder_hidden_size 64 --batch_size 2 --max_steps "${run#*-}" --logging_steps 1 \
                --max_test_samples 20 --seed "$seed" --output_dir "$here/$run-seed$seed" "$@"
        done
    done ;;
objectives)
    images CIFAR10
    "$PYTHON" -m hf_vicreg.cli compare "$CIFAR10" --config benchmarks/objectives.yaml --time_budget 4m --seeds 3 \
        --objectives vicreg,vicregl,simclr,barlow_twins,sigreg,byol,mae,simmim --output_dir "$OUT/objectives" "$@" ;;
*)
    echo "error: \`NAME\`: expected one of $(grep -oE '^[a-z0-9_]+\)' "$0" | tr -d ')' | paste -sd ' '), got '$name'" >&2
    exit 2 ;;
esac
