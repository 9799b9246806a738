"""What `transformers` and the hub say while a model is loaded or read: silenced, or one error with the cure."""

from __future__ import annotations

import contextlib
import pickle
import struct
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import torch

from ffnscope.errors import DeviceError, FFNScopeError, ModelError

OFFLINE_CURE = (
    "Load it once with a network (`hf download {id}`), let model.cache_dir name the folder that holds it, or leave "
    "offline mode (model.offline, HF_HUB_OFFLINE)"
)


@contextlib.contextmanager
def quiet_transformers() -> Generator[None]:
    """Silence the progress bars and notes of `transformers` while it loads; its errors still raise."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    try:
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def explained(model_id: str, *, offline: bool = False) -> Generator[None]:
    """Turn what `transformers` and the hub client raise into one error that says what to do.

    Args:
        model_id: what the user asked for.
        offline: the user asked for no network.

    Raises:
        ModelError: for everything about the checkpoint, the hub, or the arguments.
        DeviceError: the model does not fit.
    """
    from safetensors import SafetensorError

    try:
        yield
    except FFNScopeError:
        raise
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"{model_id} does not fit on the device. Lower model.dtype (bfloat16) or set model.device_map."
        ) from error
    except OSError as error:
        raise ModelError(f"cannot load {model_id!r}: {_hub_cure(error, model_id, offline)}.") from error
    except SafetensorError as error:
        raise ModelError(
            f"cannot load {model_id!r}: a safetensors file is damaged or incomplete ({_first_line(error)}). Delete it "
            "and download or copy it again."
        ) from error
    except (pickle.UnpicklingError, EOFError) as error:
        raise ModelError(
            f"cannot load {model_id!r}: its pickle file is damaged, or holds more than tensors, which is never loaded "
            "because it could be code. Use a safetensors version of it."
        ) from error
    except TypeError as error:
        raise ModelError(
            f"cannot load {model_id!r}: {_first_line(error)}. Look at model.model_kwargs and model.tokenizer_kwargs."
        ) from error
    except (ImportError, ValueError, LookupError, RuntimeError, struct.error) as error:
        if "ignore_mismatched_sizes" in str(error):
            raise ModelError(
                f"cannot load {model_id!r}: its weights have other shapes than its config.json says. One of the two "
                "was changed or copied alone: copy or download the whole checkpoint again. A checkpoint of ffnscope "
                "with FFNs of different widths needs its keys ffnscope_narrowed and auto_map in config.json."
            ) from error
        cure = _cure(error, model_id, offline)
        raise ModelError(f"cannot load {model_id!r}: {_first_line(error)}.{cure}") from error


@contextlib.contextmanager
def reading(weight: str, place: Callable[[], tuple[Path, str] | None]) -> Generator[None]:
    """Turn a failure of reading a weight of a loaded model into a ModelError, also while something is written.

    Args:
        weight: its name.
        place: finds its file, and its name there; None where it is in no safetensors.
    """
    from safetensors import SafetensorError

    try:
        yield
    except FFNScopeError:
        raise
    except (OSError, SafetensorError) as error:
        found = place()
        where = f" of {found[0]}" if found else ""
        raise ModelError(
            f"the weight {weight}{where} cannot be read: {error}. Its file was moved, changed or damaged since the "
            "model was loaded. Put an intact copy there, and call again."
        ) from error


def _hub_cure(error: OSError, model_id: str, offline: bool) -> str:
    """What went wrong with a file or with the hub, and what to do; the hub's own exception is the cause of others."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{model_id}"
    chain = list(_chain(error))
    if any(isinstance(e, errors.HFValidationError) for e in chain):
        return "it is neither a file or folder here nor a possible hub id (owner/name)"
    first = next((e for e in chain if isinstance(e, errors.HfHubHTTPError | errors.LocalEntryNotFoundError)), None)
    refused = next((e for e in chain if isinstance(e, errors.HfHubHTTPError)), None)
    status = None if refused is None else getattr(refused.response, "status_code", None)
    if isinstance(refused, errors.GatedRepoError):
        who = "your account has no access yet" if status == 403 else "you are not logged in"
        return (
            f"it is gated, and {who}. Accept its licence at {page}, then log in with `hf auth login`, or let HF_TOKEN "
            "(model.token_env) hold a token of that account"
        )
    if isinstance(refused, errors.RevisionNotFoundError):
        return f"it has no such revision. Look at {page}/tree/main for branches, tags and commits (model.revision)"
    if isinstance(refused, errors.RepositoryNotFoundError):
        return (
            f"the hub knows no such model, or it is private. Look for a misspelling at {page}; for a private one log "
            "in with `hf auth login`, or set HF_TOKEN (model.token_env)"
        )
    if status in (401, 403):
        return f"the hub refuses the token ({status}). Log in again with `hf auth login`, or correct HF_TOKEN"
    if isinstance(first, errors.LocalEntryNotFoundError) and (offline or constants.is_offline_mode()):
        return f"it is not in the cache, and offline mode is on. {OFFLINE_CURE.format(id=model_id)}"
    if first is not None:
        where = f"the hub at {constants.ENDPOINT}"
        what = f"{where} answers {status}" if status else f"{where} cannot be reached ({_first_line(chain[-1])})"
        return (
            f"{what}, and the model is not in the cache. Check the network and HF_ENDPOINT and try again, or give a "
            "local folder, a .gguf file or package:DIST"
        )
    return _first_line(error)


def _cure(error: BaseException, model_id: str, offline: bool) -> str:
    from huggingface_hub import constants

    text = str(error)
    if "GGUF" in text:
        return " Give the checkpoint that this GGUF was made from: a hub id, or a folder with config.json."
    if "backend tokenizer" in text and not offline:
        return " Its tokenizer files (tokenizer_config.json; tokenizer.json or tokenizer.model) are missing: add them."
    if "offload_folder" in text:
        return " Set model.offload_folder."
    if (offline or constants.is_offline_mode()) and "tokenizer" in text:
        return f" Perhaps not all its files are in the cache. {OFFLINE_CURE.format(id=model_id)}."
    return ""


def _chain(error: BaseException) -> Iterator[BaseException]:
    found: Any = error
    while found is not None:
        yield found
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0].rstrip(".")
