"""The folder that `realgeneral precompute` writes: latents and text features by the hash of everything they depend on.

    precompute.json            fingerprints of the encoders, dtype, text window, variants
    shards/NAME.safetensors    tensors by key
    shards/NAME.json           their checksums, and the keys of pictures that could not be read with the reason

Both JSON files hold the digest of their other entries.

A shard's json is written last: what a killed process leaves behind without one is not part of the store.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from realgeneral.errors import Failure, UsageError
from realgeneral.files import locked, replacing, write_text

SETTINGS_FILE = "precompute.json"
# raised when what is stored for the same inputs changes, so that older entries are not found any more
FORMAT = 1
OPEN_SHARDS = 64


class StoreFailure(Failure):
    """Nothing that can be used is stored: never passed over like a bad row."""


@dataclass(frozen=True)
class StoreSettings:
    """What all entries of a store share.

    Args:
        vae: Fingerprint of the VAE's files.
        text: Fingerprint of the text encoder's and tokenizer's files.
        dtype: Of the encoders, and of what is stored.
        window: Text window in tokens.
        variants: Draws of what is random (the hole of inpainting, nano's augmentation) per row.
        format: Version of the store.
    """

    vae: str
    text: str
    dtype: str
    window: int
    variants: int
    format: int = FORMAT


def sealed(record: Mapping[str, Any]) -> str:
    """A record as JSON, with the digest of its other entries."""
    return json.dumps({**record, "digest": _key(record)}, indent=1) + "\n"


def unsealed(text: str) -> dict[str, Any]:
    """The record of `sealed`; ValueError if it was changed. Earlier stores have no digests to tell by."""
    record: dict[str, Any] = json.loads(text)
    digest = record.pop("digest", None)
    if digest is not None and digest != _key(record):
        raise ValueError("other text than was written")
    return record


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]


class Store:
    """Reading access; picklable, and opened anew in each process.

    Args:
        folder: Of `realgeneral precompute`.

    Raises:
        Failure: Not a store, or a damaged index.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.settings = read_settings(self.folder)
        self.places: dict[str, tuple[str, int]] = {}
        self.bad: dict[str, str] = {}
        for path, index in read_indexes(self.folder):
            self.places.update((key, (path.stem, crc)) for key, crc in index["entries"].items())
            self.bad.update(index["bad"])
        self._open: OrderedDict[str, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __contains__(self, key: str) -> bool:
        return key in self.places or key in self.bad

    def latents_key(self, identity: Any) -> str:
        """Key of the latents of a picture; `identity` is all that its pixels depend on, as JSON types."""
        return _key("latents", FORMAT, self.settings.vae, self.settings.dtype, identity)

    def text_key(self, prompt: str) -> str:
        """Key of the text features of a prompt."""
        return _key("text", FORMAT, self.settings.text, self.settings.dtype, self.settings.window, prompt)

    def latents(self, identity: Any, name: str) -> Tensor:
        """[C, h, w], as the VAE gave them.

        Args:
            identity: As for `latents_key`.
            name: The row, for the message.

        Raises:
            Failure: The picture could not be read when it was to be encoded.
            StoreFailure: No such entry: the row, its task, size or the encoders are not those of the precomputation.
        """
        key = self.latents_key(identity)
        if key in self.bad:
            raise Failure(self.bad[key])
        return self._get(key, f"the latents of {name}; its pictures, task or size changed, or it is not done")

    def text(self, prompt: str) -> Tensor:
        """[T, E], as the text encoder gave them; StoreFailure if there is no such entry."""
        return self._get(self.text_key(prompt), f"the text features of {prompt[:60]!r}; the prompt changed, or it is not done")

    def check(self, vae: str, text: str, dtype: str, window: int) -> None:
        """StoreFailure if the store was made with other encoders."""
        wanted = StoreSettings(vae, text, dtype, window, self.settings.variants)
        check_settings(self.folder, self.settings, wanted)

    def _get(self, key: str, what: str) -> Tensor:
        if key not in self.places:
            raise StoreFailure(f"{self.folder} must hold {what}: run realgeneral precompute again, which adds what is missing")
        name, crc = self.places[key]
        path = self.folder / "shards" / f"{name}.safetensors"
        try:
            tensor: Tensor = self._shard(name, path).get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise _damaged(path, str(error)) from None
        if checksum(tensor) != crc:
            raise _damaged(path, "another checksum")
        return tensor

    def _shard(self, name: str, path: Path) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(path, framework="pt")
            while len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(name)
        return self._open[name]


def _damaged(path: Path, what: str) -> StoreFailure:
    return StoreFailure(
        f"{path} must be as it was written, got {what}; delete it and {path.stem}.json and run realgeneral precompute again"
    )


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def read_settings(folder: Path) -> StoreSettings:
    """The settings of a store; Failure if the folder is not one."""
    path = folder / SETTINGS_FILE
    try:
        described = unsealed(path.read_text(encoding="utf-8"))
        return StoreSettings(**{f.name: described[f.name] for f in fields(StoreSettings)})
    except FileNotFoundError:
        raise Failure(f"precomputed must be a folder that realgeneral precompute wrote, got {folder}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Failure(f"{path} must be as realgeneral precompute wrote it, got: {error!r}") from None


def check_settings(folder: Path, have: StoreSettings, wanted: StoreSettings) -> None:
    """StoreFailure that names the first setting in which a store differs."""
    words = {
        "vae": "the VAE of this base",
        "text": "the text encoder and tokenizer of this base",
        "dtype": f"dtype {wanted.dtype}",
        "window": f"a text window of {wanted.window}",
        "variants": f"{wanted.variants} variants",
        "format": f"format {wanted.format}",
    }
    for name, word in words.items():
        one, two = getattr(have, name), getattr(wanted, name)
        if one != two:
            raise StoreFailure(f"{folder} must be precomputed with {word} ({name} {two}), got {one}; use another folder")


def read_indexes(folder: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """The index of each shard whose tensors are there."""
    for path in sorted((folder / "shards").glob("*.json")):
        try:
            index = unsealed(path.read_text(encoding="utf-8"))
            entries, size = index["entries"], index["bytes"]
            tensors = path.with_suffix(".safetensors")
            if entries and (not tensors.is_file() or tensors.stat().st_size != size):
                found = f"{tensors.stat().st_size} bytes instead of {size}" if tensors.is_file() else "no such file"
                raise _damaged(tensors, found)
            yield path, {"entries": entries, "bad": index["bad"]}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged(path.with_suffix(".safetensors"), f"a damaged index: {error!r}") from None


class StoreWriter:
    """Adds shards to a store.

    Args:
        folder: Made if it is new.
        settings: Must be those of the store if it is not.
        prefix: Names of this process's shards start with it.
        shard_bytes: Tensors of a shard.

    Raises:
        UsageError: The folder holds something else.
        StoreFailure: The store was made with other settings.
    """

    def __init__(self, folder: Path, settings: StoreSettings, prefix: str, shard_bytes: int) -> None:
        self.folder, self.prefix, self.shard_bytes = folder, prefix, shard_bytes
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"output must be a folder, got {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        # processes that start at once may each be the first: settings, whole or not at all, are there before anything else is;
        # listing comes before asking for them, so that what a sibling adds in between is never taken for a stranger's
        strangers = [path.name for path in folder.iterdir() if not path.name.startswith(SETTINGS_FILE)]
        if (folder / SETTINGS_FILE).exists():
            check_settings(folder, read_settings(folder), settings)
        elif strangers:
            raise UsageError(f"output must be a new folder or one of realgeneral precompute, got {folder} with {strangers[0]}")
        else:
            write_text(folder / SETTINGS_FILE, sealed(asdict(settings)), shared=True)
        (folder / "shards").mkdir(exist_ok=True)
        self.store = Store(folder)
        self.tensors: dict[str, Tensor] = {}
        self.bad: dict[str, str] = {}
        self.bytes = self.written = 0

    def __contains__(self, key: str) -> bool:
        return key in self.tensors or key in self.bad or key in self.store

    def add(self, key: str, tensor: Tensor) -> None:
        """Keep a tensor; writes a shard when enough have come together."""
        self.tensors[key] = tensor.detach().cpu().contiguous()
        self.bytes += self.tensors[key].nbytes
        if self.bytes >= self.shard_bytes:
            self.flush()

    def add_bad(self, key: str, reason: str) -> None:
        """Note why there is no tensor for a key."""
        self.bad[key] = reason

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the name of this process's shards; whatever ends the work inside (Ctrl-C, say), what is encoded is written.

        Raises:
            Failure: Another process writes shards of this name.
        """
        shards = self.folder / "shards"
        with locked(shards, self.prefix):
            for left in shards.glob(f"{self.prefix}-*.partial"):  # of one that was killed
                left.unlink()
            try:
                yield
            except BaseException:
                self.flush()
                raise

    def flush(self) -> None:
        """Write what has come together: tensors first, then their index."""
        if not self.tensors and not self.bad:
            return
        shards = self.folder / "shards"
        number = 1 + max((int(p.stem.rpartition("-")[2]) for p in shards.glob(f"{self.prefix}-*.json")), default=-1)
        path = shards / f"{self.prefix}-{number:05d}.safetensors"
        try:
            if self.tensors:
                with replacing(path) as partial:
                    partial.write_bytes(save(self.tensors))  # save_file makes files that only their owner can read
            entries = {key: checksum(tensor) for key, tensor in self.tensors.items()}
            size = path.stat().st_size if self.tensors else 0
            write_text(path.with_suffix(".json"), sealed({"bytes": size, "entries": entries, "bad": self.bad}))
        except (OSError, SafetensorError) as error:
            raise Failure(f"{path} could not be written ({error}); shards before it are intact") from None
        self.written += len(self.tensors)
        self.store.places.update((key, (path.stem, crc)) for key, crc in entries.items())
        self.store.bad.update(self.bad)
        self.tensors, self.bad, self.bytes = {}, {}, 0
