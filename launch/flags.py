"""Config files on the command line: `--config=FILE.py[:variant]` and `--config.some.key=value` overrides."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import difflib
import errno
import importlib.util
import os
import pathlib
from typing import Any

BAD_INPUT = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)
"""Errors of the user, who can mend them."""

_NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG)


def is_bad_input(error: BaseException) -> bool:
    """Whether an error is answered with one line, not with a traceback: `BAD_INPUT`, or no place to write to."""
    return isinstance(error, BAD_INPUT) or (isinstance(error, OSError) and error.errno in _NO_PLACE)


def check_can_write(flag: str, file: str | None) -> None:
    """ValueError before the work whose result `--flag=file` could not take."""
    if not file:
        return
    path = pathlib.Path(file)
    if not path.parent.is_dir():
        raise ValueError(f"--{flag}={file}: there is no directory {str(path.parent)!r}; make it, or give another file")
    if path.is_dir():
        raise ValueError(f"--{flag}={file} is a directory; give a file in it")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"--{flag}={file} cannot be written; give a file in a directory of yours")


def add_config_argument(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Adds `--config`; overrides of single keys are taken by `launch.cli` from what the parser does not know."""
    parser.add_argument(
        "--config",
        required=default is None,
        default=default,
        metavar="FILE.py[:VARIANT]",
        help="ml_collections config file; --config.KEY=VALUE overrides one key"
        + (f" (default: {default})" if default else ""),
    )


def resolve_path(path: str) -> pathlib.Path:
    """A config file as given, or, where there is none, the installed one of the same name (`configs/pretrain.py`)."""
    given = pathlib.Path(path)
    if given.is_file():
        return given
    import configs

    folder = pathlib.Path(configs.__file__).parent
    shipped = folder / given.name
    if given.parent in (pathlib.Path("configs"), pathlib.Path(".")) and shipped.is_file():
        return shipped
    names = sorted(file.name for file in folder.glob("*.py") if file.stem not in ("__init__", "common"))
    raise ValueError(f"no config file {path!r}; shipped ones are {', '.join('configs/' + name for name in names)}")


def read_config(target: str) -> Any:
    """The ConfigDict that `FILE.py[:VARIANT]` builds, before any override; ValueError for a file or variant unknown."""
    file, _, variant = target.partition(":")
    path = resolve_path(file)
    spec = importlib.util.spec_from_file_location(f"aromni_config_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.get_config(variant) if variant else module.get_config()
    except (SyntaxError, ImportError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"config {target!r} cannot be built: {type(error).__name__}: {error}") from error


def _keys_of(config: Any, prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in config.items():
        found[prefix + key] = value
        if hasattr(value, "items"):
            found |= _keys_of(value, f"{prefix}{key}.")
    return found


def _with_model_fields(config: Any) -> dict[str, Any]:
    """`_keys_of`, and the fields of the model that the config leaves to its size, with their values there."""
    from aromni_jax.models.config import ModelConfig, named_size

    found = _keys_of(config)
    if "model" in found:
        size = config.model if isinstance(config.model, str) else config.model.get("size")
        fields = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
        fields |= {"size": size, **named_size(size)} if size else {}
        named = {f"model.{name}": value for name, value in fields.items() if value is not dataclasses.MISSING}
        found = named | found
    return found


def _override(config: Any, key: str, text: str) -> None:
    """Sets one key of `config` from the text after `=`; a group is replaced whole, by a literal or the word it is."""
    from ml_collections import ConfigDict

    current = _with_model_fields(config)[key]
    value: Any = text
    if not isinstance(current, str) or text.startswith("{"):
        with contextlib.suppress(SyntaxError, ValueError):
            value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    *parents, name = key.split(".")
    if parents == ["model"]:
        # Whatever of the model is not written comes from its size: the same model, with one more field.
        model = {"size": config.model} if isinstance(config.model, str) else config.model.to_dict()
        with config.ignore_type():
            config.model = ConfigDict(model | {name: current})
    for parent in parents:
        config = config[parent]
    try:
        if isinstance(current, ConfigDict) or isinstance(value, dict) or current is None:
            with config.ignore_type():
                config[name] = ConfigDict(value) if isinstance(value, dict) else value
        else:
            config[name] = value
    except TypeError as error:
        raise ValueError(f"config key '{key}': must be of type {type(current).__name__}, not {text!r}") from error


def load_config(args: argparse.Namespace) -> Any:
    """The ConfigDict of `args.config` with `args.config_overrides` applied.

    A group such as `data.mixture` is replaced whole: by a word (`synthetic`) or by a literal
    (`--config.data.mixture="{'mine': {'path': 'data/mine', 'weight': 1.0}}"`). Every field of the model is a key, also
    where the config names only its size (`--config.model.remat=offload`).

    Raises:
      ValueError: no such file, a variant it does not know, an unknown key (with the nearest one) or a mistyped value.
    """
    config = read_config(args.config)
    for override in args.config_overrides:
        key, equals, text = override.removeprefix("--config.").partition("=")
        known = _with_model_fields(config)
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
            raise ValueError(f"config key '{key}': unknown; {hint}")
        if not equals:
            raise ValueError(f"config key '{key}': give a value, --config.{key}=VALUE")
        _override(config, key, text)
    return config
