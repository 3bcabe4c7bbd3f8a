"""The command line: `fastformer train|generate|presets|info`.

fastformer train gpt --data book.txt --out runs/book
fastformer generate --out runs/book --prompt "Once upon"
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

_USAGE = """usage: fastformer COMMAND

Train BERT, GPT and ViT on kernels written for them.

commands:
  train gpt       train a decoder on text: next token
  train bert      train an encoder on text: masked tokens
  train vit       train an encoder on images: their class
  generate        continue a text with a trained GPT
  presets         list the models and their sizes
  info            describe this machine, the build and every backend

`fastformer COMMAND --help` describes the options of a command."""

_TRAIN = {
    "gpt": "Train a GPT: a decoder that predicts the next token of text.",
    "bert": "Train a BERT: an encoder that fills in masked tokens of text.",
    "vit": "Train a ViT: an encoder that tells the class of an image.",
}

_TRAIN_PACKAGES = ("matplotlib", "PIL", "rich", "sklearn", "tokenizers", "tyro")


def _fail(message: str) -> int:
    print(f"fastformer: error: {message}", file=sys.stderr)
    return 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0, 1 (diverged), 2 (bad input), 128 + signal."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    command = argv[0] if argv else "--help"
    if command in ("-h", "--help", "help"):
        print(_USAGE)
        return 0 if argv else 2
    if command == "--version":
        from fastformer._checkout import version

        print(f"fastformer {version()}")
        return 0
    commands = {"train": _train, "generate": _generate, "presets": _presets, "info": _info}
    if command not in commands:
        return _fail(
            f"unknown command {command!r}{_near(command, commands)}; see fastformer --help"
        )
    try:
        return commands[command](argv[1:])
    except KeyboardInterrupt:
        print("fastformer: interrupted", file=sys.stderr)
        return 130
    except ImportError as error:
        if error.name in _TRAIN_PACKAGES:
            return _fail(f"{error.name} is missing: pip install 'fastformer[train]'")
        return _fail(str(error))


def _near(word: str, known: Any) -> str:
    import difflib

    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _parse(config_class: Any, argv: Sequence[str], **options: Any) -> Any:
    import tyro

    settings = (tyro.conf.DisallowNone,)
    return tyro.cli(config_class, args=list(argv), config=settings, **options)


def _train(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if argv else 2
    kind: Any = argv[0]
    if kind not in _TRAIN:
        return _fail(f"train: unknown model {kind!r}{_near(kind, _TRAIN)} (known: bert, gpt, vit)")
    import matplotlib  # noqa: F401  (needed at the very end: say now if it is missing)

    from fastformer.train.config import RunError
    from fastformer.train.data import DataError
    from fastformer.train.loop import train

    try:
        train(kind, _training_config(kind, argv[1:]))
    except RunError as error:
        print(f"fastformer: {_word(error)}: {error}", file=sys.stderr)
        return error.exit_code
    except DataError as error:
        # From a loader process the message comes with its traceback; the last line is ours.
        return _fail(str(error).splitlines()[-1].removeprefix("fastformer.train.data.DataError: "))
    return 0


def _word(error: Any) -> str:
    return "stopped" if error.exit_code > 2 else "error"


def _training_config(kind: Any, argv: Sequence[str]) -> Any:
    """Parse the options over the right defaults: the preset's, or those of the run to resume."""
    from fastformer.train import config as configs
    from fastformer.train.folder import read_config

    options = {"prog": f"fastformer train {kind}", "description": _TRAIN[kind]}
    data, preset = _value(argv, "--data"), _value(argv, "--preset")
    default = configs.default_config(kind, preset or configs.default_preset(kind, data))
    if "--resume" in argv:
        out = _value(argv, "--out")
        if out is None:
            raise configs.RunError("--resume needs --out, the folder of the run to go on with")
        from pathlib import Path

        stored = read_config(Path(out))
        if stored is not None and stored["kind"] == kind:
            default = configs.from_json(kind, stored["train"])
    return _parse(type(default), argv, default=default, **options)


def _value(argv: Sequence[str], flag: str) -> Any:
    """The value of a flag before the real parsing, whose defaults depend on it."""
    for position, word in enumerate(argv):
        if word.startswith(flag + "="):
            return word.partition("=")[2]
        if word == flag and position + 1 < len(argv):
            return argv[position + 1]
    return None


def _generate(argv: Sequence[str]) -> int:
    from fastformer.generate import GenerateConfig, generate_text

    config = _parse(
        GenerateConfig,
        argv,
        prog="fastformer generate",
        description="Continue a text with a trained GPT.",
    )
    try:
        for text in generate_text(config):
            print(text)
    except ValueError as error:
        return _fail(str(error))
    return 0


def _presets(argv: Sequence[str]) -> int:
    import torch

    from fastformer.presets import PRESETS, from_preset

    if argv and argv[0] not in ("-h", "--help"):
        return _fail(f"presets takes no arguments, got {argv[0]!r}")
    width = max(map(len, PRESETS))
    sizes = f"{'C':>5} {'L':>3} {'H':>3} {'F':>5} {'T':>5}"
    print(f"{'preset':<{width}} {'parameters':>12}  {sizes}  about")
    for name, preset in PRESETS.items():
        with torch.device("meta"):
            count = from_preset(name).num_parameters
        c = preset.config
        shape = f"{c.dim:>5} {c.layers:>3} {c.heads:>3} {c.hidden_dim:>5} {c.max_tokens:>5}"
        print(f"{name:<{width}} {count:>12,}  {shape}  {preset.about}")
    return 0


def _info(argv: Sequence[str]) -> int:
    from fastformer.info import describe

    if argv and argv[0] not in ("-h", "--help"):
        return _fail(f"info takes no arguments, got {argv[0]!r}")
    print(describe())
    return 0


if __name__ == "__main__":
    sys.exit(main())
