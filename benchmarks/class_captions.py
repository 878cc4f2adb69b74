"""Captions from class names, to try a captioner on images that have labels alone.

    python -m benchmarks.class_captions --dataset_name CIFAR10_FOLDER --out captions
    hf-vicreg finetune captioning runs/cifar --dataset_name captions --output_dir runs/captioner --flip_probability 0.5

An image of class `dog` gets "a photo of a dog". Each class has one caption, so the captioner's `exact_match` is how
often it names the right class. Rows are shuffled once: the first so many are a sample of all classes.
"""

import argparse

import datasets


def main() -> None:
    """Write a `datasets` folder with the columns `image` and `text`."""
    parser = argparse.ArgumentParser(description="Captions from class names.")
    parser.add_argument("--dataset_name", required=True, help="folder or Hub id with `image` and `label`")
    parser.add_argument("--out", required=True, help="folder to write")
    arguments = parser.parse_args()
    splits = datasets.load_dataset(arguments.dataset_name)
    captioned = {}
    for name, rows in splits.items():
        classes = rows.features["label"].names
        texts = [f"a photo of {'an' if classes[one][0] in 'aeiou' else 'a'} {classes[one]}" for one in rows["label"]]
        captioned[name] = rows.select_columns(["image"]).add_column("text", texts).shuffle(seed=0)
    datasets.DatasetDict(captioned).save_to_disk(arguments.out)


if __name__ == "__main__":
    main()
