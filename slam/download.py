"""Models from the web, kept in a cache: repositories of the Hugging Face hub, and the two files published with TWIST.

    from_hub("Qwen/Qwen2.5-0.5B", ["*.json", "*.safetensors"])
    published("hifigan_lj_mhubert_base_25hz.pt", "d882…")
"""
import hashlib
import http.client
import sys
import urllib.request
from pathlib import Path

from slam.embedded import cache_dir, file_digest
from slam.units import write_atomic

TWIST_URL = "https://dl.fbaipublicfiles.com/textless_nlp/twist/speech_tokenizer/"  # mHuBERT-25hz's k-means and vocoder


def published(name: str, sha256: str) -> Path:
    """A file published with TWIST, from the cache or the web, checked on every use. SystemExit if it can't be had."""
    url, path = TWIST_URL + name, cache_dir() / "published" / name
    if not path.is_file():
        print(f"fetching {url} into {path.parent}", file=sys.stderr)
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                content = answer.read()
            if hashlib.sha256(content).hexdigest() != sha256:  # a network's login page, perhaps
                raise OSError("what came is not the published file")
            write_atomic(path, content)
        except (OSError, http.client.HTTPException) as e:
            raise SystemExit(f"{url}: can't be fetched ({e}). Look at the network and the disk, then start again; or "
                             f"put the file at {path} by hand") from None
    if (found := file_digest(path)) != sha256:
        raise SystemExit(f"{path}: not the published file: its sha256 is {found} instead of {sha256}; remove it, and "
                         f"fetch it again")
    return path


def from_hub(repo: str, patterns: list[str], kind: str = "model", folder: str | Path | None = None) -> Path:
    """Files of a repository of the Hugging Face hub, into its cache or a folder; SystemExit if they can't be fetched.

    kind: model or dataset. huggingface_hub resumes and checks what it fetches.
    """
    from huggingface_hub import errors, snapshot_download
    try:
        return Path(snapshot_download(repo, repo_type=kind, allow_patterns=patterns, local_dir=folder))
    except (errors.HTTPError, OSError) as e:
        page = f"https://huggingface.co/{'datasets/' * (kind == 'dataset')}{repo}"
        raise SystemExit(f"{repo}: no such folder here, and downloading it from the Hugging Face hub failed: "
                         f"{' '.join(str(e).split()) or type(e).__name__} Check the name, the network and the disk. If "
                         f"{page} asks for an account, accept its licence there, make a token at "
                         f"https://huggingface.co/settings/tokens, and run `hf auth login` or export HF_TOKEN=…. "
                         f"What has come is kept; start again, and it goes on") from None
