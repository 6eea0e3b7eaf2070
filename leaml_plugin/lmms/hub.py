"""Whether a data set on the Hugging Face Hub can be had, told in one sentence before anything waits for it.

Covers: a quick look at the local Hub cache and at the Hub itself. Does not cover: downloading (``datasets`` does).
"""

from __future__ import annotations

from typing import Any

from leaml_plugin.errors import LeamlError


def hub_source(repo: str, otherwise: str) -> tuple[str, dict[str, Any]]:
    """``(repo, {})`` for ``load_dataset``, where the Hub answers within ten seconds or the data set is cached.

    ``otherwise`` completes the sentence of the :class:`LeamlError` raised where it is neither: what to do.
    Without this look, an offline machine waits through minutes of retries and shows none of this.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import HFValidationError

    if _is_cached(repo):
        return repo, {}
    try:
        huggingface_hub.HfApi().dataset_info(repo, timeout=10)
    except OfflineModeIsEnabled as error:
        raise LeamlError(f"{repo} is not cached and HF_HUB_OFFLINE is set; {otherwise}") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no")
        raise LeamlError(f"{repo}: the Hub refuses it (status {status}); {otherwise}") from error
    except (HFValidationError, OSError, *_network_errors()) as error:
        raise LeamlError(f"{repo}: the Hub cannot be reached ({type(error).__name__}); {otherwise}") from error
    return repo, {}


def _is_cached(repo: str) -> bool:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return any(entry.repo_id == repo and entry.repo_type == "dataset" for entry in scan_cache_dir().repos)
    except CacheNotFound:
        return False


def _network_errors() -> tuple[type[Exception], ...]:
    """The transport errors of whichever HTTP library this version of huggingface_hub uses."""
    found: list[type[Exception]] = []
    for module, name in (("httpx2", "HTTPError"), ("httpx", "HTTPError"), ("requests", "RequestException")):
        try:
            found.append(getattr(__import__(module), name))
        except ImportError:
            continue
    return tuple(found)
