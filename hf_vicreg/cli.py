"""The command `hf-vicreg VERB`. An `InputError` gets one line and exit code 2, a fault of ours its traceback."""

import argparse
import sys
from pathlib import Path

from hf_vicreg._version import __version__
from hf_vicreg.training.errors import InputError, blamed_on, log_to_stderr, memory_to_hold, place_for, tell
from hf_vicreg.training.launch.meeting import end_with
from hf_vicreg.training.run.flags import LineParser

OF_SEVERAL = ("finetune", "evaluate", "embed", "convert")  # verbs that a launcher may start as several processes


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; return the exit code: 2 for bad input, 130 for Ctrl-C, else what the verb says."""
    try:
        return _main(arguments)
    except KeyboardInterrupt:  # a training, once begun, stops with a checkpoint instead
        print("interrupted", file=sys.stderr)
        return 130


def _main(arguments: list[str] | None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["pretrain"]:  # its flags are the recipe's, which argparse does not know
        from hf_vicreg.training.command import main as pretrain

        return pretrain(given[1:])
    try:
        parsed = build_parser().parse_args(given)
        with memory_to_hold():
            code = parsed.run(parsed)
    except InputError as error:
        if given[:1] and given[0] in OF_SEVERAL:
            return end_with(error)
        tell(error)
        return 2
    return code or 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of every verb; `run` of its result does what was asked."""
    from hf_vicreg.comparison.command import add_compare
    from hf_vicreg.evaluation_commands import add_verbs
    from hf_vicreg.explore.command import add_explore
    from hf_vicreg.task_commands import add_tasks
    from hf_vicreg.tuning.command import add_tune

    parser = LineParser(prog="hf-vicreg", description="Vision transformers pretrained by VICReg.")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    verbs.add_parser(
        "pretrain", help="pretrain an encoder; as `accelerate launch -m hf_vicreg.training.pretrain` does"
    )
    inspect = verbs.add_parser("inspect", help="what a model's attention costs and looks like, or a folder of images")
    whats = inspect.add_subparsers(required=True, metavar="WHAT")
    cost = whats.add_parser("cost", help="FLOPs and memory at an image size, dense and by blocks")
    pattern = whats.add_parser("pattern", help="which tile sees which, as text or SVG")
    for one in (cost, pattern):
        one.add_argument("model", metavar="MODEL", help="folder or Hub id of a BigBirdViT")
        one.add_argument("--height", type=int, help="image height in pixels; default: the model's image size")
        one.add_argument("--width", type=int, help="image width in pixels; default: the model's image size")
    cost.add_argument("--measure", action="store_true", help="time each form of attention on this machine, too")
    pattern.add_argument("--layer", type=int, default=0)
    pattern.add_argument("--output", type=Path, help="SVG file to write")
    cost.set_defaults(run=_cost)
    pattern.set_defaults(run=_pattern)
    images = whats.add_parser("images", help="a whole set of images: sizes, kinds, copies, what would be skipped")
    images.add_argument("source", metavar="SOURCE", help="folder of images, local `datasets` folder or Hub id")
    images.add_argument("--patch_size", type=int, help="in pixels; smaller images are skipped")
    images.add_argument("--image_size", type=int, help="in pixels; how many images would be enlarged")
    images.add_argument(
        "--num_channels",
        "--model.num_channels",
        type=int,
        help="read a folder's images with so many channels, not as RGB",
    )
    images.add_argument("--num_proc", type=int, help="threads that read; default: the cores at hand")
    images.add_argument("--json", type=Path, metavar="FILE", help="file to write everything to, each image skipped")
    images.add_argument("--dataset_config_name", help="configuration of the Hub dataset")
    images.add_argument("--train_split", default="train", help="split to read (default: train)")
    images.add_argument("--image_column_name", help="column of images; default: the only one")
    images.add_argument("--label_column_name", help="column of labels; default: `label` if there is one")
    images.set_defaults(run=_images)
    views = whats.add_parser("views", help="a picture of what a model sees of a set of images")
    views.add_argument("source", metavar="DATA", help="folder of images, local `datasets` folder, Hub id, or `digits`")
    views.add_argument("out", metavar="OUT", type=Path, help="PNG file to write")
    views.add_argument("--preset", help="augmentation by name: photo, microscopy, pathology, satellite, medical, ...")
    views.add_argument(
        "--num_channels", "--model.num_channels", type=int, default=3, help="of the images (default: 3)"
    )
    views.add_argument("--normalisation", nargs="+", help="photo, percentile, minmax or fixed LOW HIGH")
    views.add_argument("--pages", help="what pages of a file are: channels or images")
    views.add_argument("--window", type=int, help="read larger images by windows of so many pixels a side")
    views.add_argument("--image_size", type=int, default=128, help="side of a view in pixels (default: 128)")
    views.add_argument("--num_images", type=int, default=8, help="rows of the picture (default: 8)")
    views.add_argument("--seed", type=int, default=0, help="of the views (default: 0)")
    views.set_defaults(run=_views)

    convert = verbs.add_parser("convert", help="weights of a dense ViT, DINOv2 or DINOv3 into a BigBirdViT")
    convert.add_argument("source", metavar="SOURCE", help="folder or Hub id of a ViT, DINOv2 or DINOv3 ViT")
    convert.add_argument("out", metavar="OUT", help="new or empty folder to write")
    convert.add_argument("--attention_type", choices=("original_full", "block_sparse"), default="original_full")
    convert.add_argument("--attention_layout", choices=("tiles", "raster"))
    for name in ("tile_size", "block_size", "window_size", "num_random_blocks", "num_global_tiles", "attention_seed"):
        convert.add_argument(f"--{name}", type=int, help="of the sparse pattern, as in BigBirdViTConfig")
    convert.add_argument("--images", type=Path, help="folder with images to measure the drift on; default: noise")
    convert.add_argument(
        "--image_sizes",
        type=int,
        nargs="+",
        help="sides in pixels to compare on; default: the source's, 1.5 and 2 times it",
    )
    convert.add_argument(
        "--adapt", metavar="IMAGES", help="tune the sparse result to the dense features on these images, unlabelled"
    )
    convert.add_argument("--time_budget", default="10m", help="for that: 90s, 10m, 2h (default: 10m)")
    convert.add_argument("--max_steps", type=int, help="steps of it, instead of what the time holds")
    convert.set_defaults(run=_convert)

    export = verbs.add_parser("export", help="a model as a program that runs without this package")
    export.add_argument("model", metavar="MODEL", help="folder or Hub id of any vision model of transformers")
    export.add_argument("out", metavar="OUT", help="file to write, NAME.onnx or NAME.pt2")
    export.add_argument("--format", required=True, help="onnx (onnxruntime) or torch (torch.export)")
    export.add_argument("--task", default="features", help="features, classification or detection (default: features)")
    export.add_argument("--height", type=int, help="image height in pixels; default: the model's")
    export.add_argument("--width", type=int, help="image width in pixels; default: the model's")
    export.add_argument("--int8", action="store_true", help="weights of linear layers as 8-bit integers; onnx alone")
    export.add_argument("--images", help="folder with images to compare on; default: noise")
    export.set_defaults(run=_export)

    publish = verbs.add_parser("publish", help="a run's folder, or a fine-tuned one, onto the Hub")
    publish.add_argument("folder", metavar="RUN", help="folder of a finished run or fine-tuned BigBirdViT; only read")
    publish.add_argument("--repo", required=True, metavar="OWNER/NAME", help="repository on the Hub; made if new")
    publish.add_argument("--private", action="store_true", help="make it private; default: as the owner has set")
    publish.add_argument("--revision", help="branch to publish to, made if new; default: main")
    publish.add_argument("--create_pr", action="store_true", help="open a pull request instead")
    publish.add_argument("--dry_run", action="store_true", help="print files, sizes and card; send nothing")
    publish.add_argument("--license", help="of the weights, by the Hub's short name for it; default: none is named")
    publish.add_argument(
        "--include_pretraining", action="store_true", help="with pretraining/, the encoder and its expander"
    )
    publish.add_argument(
        "--space", action="store_true", help="and a Space of that name: features, neighbours and attention as an app"
    )
    publish.add_argument(
        "--space_images", type=Path, metavar="FOLDER", help="images to publish with it; default: none, drawn patterns"
    )
    publish.set_defaults(run=_publish)
    doctor = verbs.add_parser(
        "doctor",
        help="what is wrong with a pretraining run, told from its log",
        description="Tell from a run's log, finished or not, whether it is healthy. Exit code 0: healthy; 1: "
        "something is wrong at the last line; 2: bad input.",
    )
    doctor.add_argument("folder", metavar="RUN", type=Path, help="the run's output_dir")
    doctor.set_defaults(run=_doctor)
    report = verbs.add_parser(
        "report",
        help="a run as one HTML page: curves, views, neighbours, attention, a map",
        description="Write a run as one HTML file that needs nothing else; of two runs, side by side. No place but "
        "RUN and IMAGES is read.",
    )
    report.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="the run's output_dir; two are compared")
    report.add_argument("--data", metavar="IMAGES", help="folder of images, `datasets` folder, Hub id or `digits`")
    report.add_argument("--output", type=Path, help="HTML file to write; default: report.html in the run's folder")
    report.set_defaults(run=_report)
    add_compare(verbs)
    add_tune(verbs)
    add_explore(verbs)
    prepare = verbs.add_parser("prepare", help="store images resized, as parquet shards that load faster")
    prepare.add_argument("source", metavar="SOURCE", help="folder of images, local `datasets` folder or Hub id")
    prepare.add_argument("out", metavar="OUT", help="new or empty folder, or an interrupted call's to go on in")
    prepare.add_argument("--size", type=int, help="largest short side in pixels (default: 256)")
    prepare.add_argument("--num_channels", type=int, help="keep so many channels, all pixels in their own depth")
    prepare.add_argument("--window", type=int, help="cut larger images into windows of so many pixels a side")
    prepare.add_argument("--pages", choices=("channels", "images"), help="what the pages of a file are")
    prepare.add_argument("--num_proc", type=int, help="processes; default: the cores at hand")
    prepare.add_argument("--dataset_config_name", help="configuration of the Hub dataset")
    prepare.add_argument("--train_split", default="train", help="split that becomes `train` (default: train)")
    prepare.add_argument("--test_split", help="labelled split that becomes `test`; default: `test` or `validation`")
    prepare.add_argument("--image_column_name", help="column of images; default: the only one")
    prepare.add_argument("--label_column_name", help="column of labels; default: `label` if there is one")
    prepare.set_defaults(run=_prepare)
    add_tasks(verbs, add_verbs(verbs))
    return parser


def _cost(arguments: argparse.Namespace) -> None:
    from hf_vicreg.attention_cost import attention_cost, measured, report

    config, height, width = _configuration(arguments)
    print(report(config, height, width, attention_cost(config, height, width)))
    if arguments.measure:
        print(f"\n{measured(config, height, width)}")


def _pattern(arguments: argparse.Namespace) -> None:
    from hf_vicreg.modeling.modeling_bigbird_vit import layer_pattern

    config, height, width = _configuration(arguments)
    rows, columns = config.grid_size(height, width)
    if not 0 <= arguments.layer < config.num_hidden_layers:
        raise InputError(f"`--layer`: expected 0 to {config.num_hidden_layers - 1}, got {arguments.layer}.")
    pattern = layer_pattern(config, rows, columns, arguments.layer)
    print(pattern)
    if arguments.output is not None:
        with blamed_on("output", f"expected a file to write, got {str(arguments.output)!r}"):
            arguments.output.write_text(pattern.svg())


def _images(arguments: argparse.Namespace) -> None:
    import json

    from hf_vicreg.evaluation_commands import log_to_stderr
    from hf_vicreg.training.prepare.inspection import inspect_images, report

    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        raise InputError(f"`--json`: expected a file in a folder that exists, got {arguments.json}.")
    log_to_stderr()
    columns = ("dataset_config_name", "train_split", "image_column_name", "label_column_name")
    found = inspect_images(
        arguments.source,
        patch_size=arguments.patch_size,
        image_size=arguments.image_size,
        num_threads=arguments.num_proc,
        num_channels=arguments.num_channels,
        **{name: getattr(arguments, name) for name in columns},
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    print(report(found))


def _views(arguments: argparse.Namespace) -> None:
    from hf_vicreg.training.prepare.contact_sheet import draw_views

    log_to_stderr()
    flags = {
        name: getattr(arguments, name) for name in ("normalisation", "pages", "window") if getattr(arguments, name)
    }
    with place_for("OUT", arguments.out):
        draw_views(
            arguments.source,
            arguments.out,
            num_images=arguments.num_images,
            image_size=arguments.image_size,
            seed=arguments.seed,
            model={"num_channels": arguments.num_channels},
            views={} if arguments.preset is None else {"preset": arguments.preset},
            **flags,
        )
    print(f"each row an image and views of it: {arguments.out}")


def _convert(arguments: argparse.Namespace) -> None:
    from hf_vicreg.convert import PATTERN_FIELDS, convert, report
    from hf_vicreg.modeling.configuration_bigbird_vit import BigBirdViTConfig

    log_to_stderr()
    pattern = {name: getattr(arguments, name) for name in PATTERN_FIELDS if getattr(arguments, name) is not None}
    with place_for("OUT", arguments.out):
        found = convert(
            arguments.source,
            arguments.out,
            attention_type=arguments.attention_type,
            image_sizes=arguments.image_sizes,
            images=arguments.images,
            adapt=arguments.adapt,
            time_budget=arguments.time_budget,
            max_steps=arguments.max_steps,
            **pattern,
        )
    config = BigBirdViTConfig.from_pretrained(arguments.out)
    print(report(found, config))
    print(f"\nwritten to {arguments.out}, attention_type={config.attention_type!r}")


def _export(arguments: argparse.Namespace) -> None:
    from hf_vicreg.export import export

    log_to_stderr()
    flags = ("format", "task", "height", "width", "int8", "images")
    with place_for("OUT", arguments.out):
        done = export(arguments.model, arguments.out, **{name: getattr(arguments, name) for name in flags})
    print(done)


def _publish(arguments: argparse.Namespace) -> None:
    from hf_vicreg.publishing.publish import publish, report

    log_to_stderr()
    with place_for("RUN", arguments.folder):
        done = publish(
            arguments.folder,
            arguments.repo,
            private=arguments.private,
            revision=arguments.revision,
            create_pr=arguments.create_pr,
            dry_run=arguments.dry_run,
            include_pretraining=arguments.include_pretraining,
            license=arguments.license,
            space=arguments.space,
            space_images=arguments.space_images,
        )
    print(report(done))


def _doctor(arguments: argparse.Namespace) -> int:
    from hf_vicreg.training.monitor.doctor import read_run, report

    with place_for("RUN", arguments.folder):
        found = read_run(arguments.folder)
    text, healthy = report(*found)
    print(text)
    return 0 if healthy else 1


def _report(arguments: argparse.Namespace) -> None:
    from hf_vicreg.training.run.places import data_setting

    for folder in arguments.runs:  # before anything heavy is imported
        if not (folder / "log.jsonl").is_file():
            raise InputError(f"`RUN`: expected the folder of a run, {folder} has no log.jsonl; name its output_dir.")
    if arguments.data is not None:
        data_setting(arguments.data, {})
    from hf_vicreg.report.report import write_report

    log_to_stderr()
    with place_for("output", arguments.output or arguments.runs[0]):
        print(write_report(*arguments.runs, data=arguments.data, output=arguments.output))


def _prepare(arguments: argparse.Namespace) -> None:
    from hf_vicreg.training.prepare.store import prepare

    log_to_stderr()
    columns = ("dataset_config_name", "train_split", "test_split", "image_column_name", "label_column_name")
    with place_for("OUT", arguments.out):
        done = prepare(
            arguments.source,
            arguments.out,
            size=arguments.size,
            num_proc=arguments.num_proc,
            num_channels=arguments.num_channels,
            window=arguments.window,
            pages=arguments.pages,
            **{name: getattr(arguments, name) for name in columns},
        )
    for split, images in done.images.items():
        skipped = done.skipped[split]
        named = ": " + ", ".join(skipped[:10]) + (", ..." if len(skipped) > 10 else "") if skipped else ""
        print(f"{split}: {images:,} images stored, {len(skipped):,} unreadable skipped{named}")
    channels = f" --model.num_channels {arguments.num_channels}" if arguments.num_channels not in (None, 3) else ""
    channels += " --normalisation percentile" * (not channels and done.measured)
    print(f"\nTo train on them: --dataset_name {arguments.out}{channels}")


def _configuration(arguments: argparse.Namespace):
    """Return the encoder's configuration and the image size asked for, checked."""
    import hf_vicreg
    from hf_vicreg.attention_cost import check_size
    from hf_vicreg.training.evaluation.encoder import load_config

    config = load_config(arguments.model)
    config = config.encoder if isinstance(config, hf_vicreg.VicRegConfig) else config
    if not isinstance(config, hf_vicreg.BigBirdViTConfig):
        raise InputError(f"`MODEL`: expected a model of type 'bigbird_vit', got {config.model_type!r}.")
    height, width = (
        own if asked is None else asked
        for asked, own in zip((arguments.height, arguments.width), config.image_size_hw, strict=True)
    )
    with blamed_on("height`, `width"):
        check_size(config, height, width)
    return config, height, width


if __name__ == "__main__":
    sys.exit(main())
