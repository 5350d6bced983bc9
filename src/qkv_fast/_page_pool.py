"""The storage of a KVCache: which pages each sequence has, which are shared and which are free."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ._dtypes import BFLOAT16, CODES, INT8, STORED, SWAPPED, Array, named, storage_code
from ._problem.arguments import as_array

LARGEST = np.iinfo(np.intp).max


class PagePool:
    """Pages of keys and values, and the sequences that have them.

    A sequence takes free pages as it grows and gives them back as it shrinks. Several sequences may
    share a page; one that appends to a shared page first copies it (copy on write). In a `fixed`
    pool sequence i has page i, of the length of the whole capacity, for good.

    Attributes
    ----------
    keys, values : ndarray, (pages, Hkv, page_size, D) and (pages, Hkv, page_size, Dv)
    key_scales, value_scales : ndarray of float32, (pages, Hkv, page_size), or None
        Factors of int8 rows.
    code : int
        The element type of keys and values.
    lengths : ndarray of int64, (batch,)
        Tokens of each sequence. It is replaced, never changed: a call of another thread that has it
        divides its work by these numbers more than once.
    table : ndarray of int64, (batch, blocks)
        The page of each page_size tokens of a sequence; -1 where it has none.
    uses : ndarray of int64, (pages,)
        How many sequences have a page.
    free : list of int
        Pages that no sequence has; the last one is taken first.
    capacity, page_size : int
        Tokens that a sequence and a page can have.
    window : int or None
        Keys before a new query's position that it sees. Pages before that are given back.
    """

    def __init__(
        self,
        keys: Array,
        values: Array,
        key_scales: Array | None,
        value_scales: Array | None,
        *,
        code: int,
        batch: int,
        capacity: int,
        fixed: bool,
        window: int | None = None,
    ) -> None:
        self.keys, self.values = keys, values
        self.key_scales, self.value_scales = key_scales, value_scales
        self.code, self.capacity, self.fixed, self.window = code, capacity, fixed, window
        self.page_size = keys.shape[2]
        self.lengths = zeros("lengths", (batch,), "i8")
        self.table = zeros("block table", (batch, -(-capacity // self.page_size)), "i8")
        self.table[...] = -1
        self.uses = np.zeros(len(keys), np.int64)
        self.free = list(range(len(keys)))[::-1]
        if fixed:
            self.table[:, 0] = np.arange(batch)
            self.uses[:] = 1
            self.free = []

    @classmethod
    def allocate(
        cls,
        dtype: str,
        batch: int,
        sizes: tuple[int, int, int],
        capacity: int,
        page_size: int | None,
        num_pages: int | None,
        window: int | None,
    ) -> PagePool:
        """Return a new pool, fixed without a page_size; `sizes` are Hkv, D and Dv.

        The default of num_pages lets all sequences reach their capacity, or with a window append
        max(window, 512) tokens at a time.
        """
        num_kv_heads, head_dim, v_dim = sizes
        if page_size is None:
            tokens, pages = capacity, batch
        else:
            at_once = capacity if window is None else min(capacity, window + max(window, 512))
            spare = 0 if window is None else 1  # the window may begin anywhere in a page
            blocks = min(-(-at_once // page_size) + spare, -(-capacity // page_size))
            tokens, pages = page_size, batch * blocks if num_pages is None else num_pages
        shape = (pages, num_kv_heads, tokens)
        keys = zeros("keys", (*shape, head_dim), STORED[CODES[dtype]])
        values = zeros("values", (*shape, v_dim), STORED[CODES[dtype]])
        key_scales = value_scales = None
        if dtype == "int8":
            key_scales = zeros("key_scales", shape, "f4")
            value_scales = zeros("value_scales", shape, "f4")
        return cls(keys, values, key_scales, value_scales, code=CODES[dtype], batch=batch,
                   capacity=capacity, fixed=page_size is None, window=window)  # fmt: skip

    @classmethod
    def of_arrays(cls, key: Any, value: Any, key_scales: Any, value_scales: Any) -> PagePool:
        """Return a fixed pool whose storage is the given arrays: (batch, Hkv, capacity, ...)."""
        key = as_array("key", key, in_place=True)
        value = as_array("value", value, in_place=True)
        if key.ndim != 4 or value.ndim != 4 or key.shape[:3] != value.shape[:3] or not key.size:
            raise ValueError(
                f"key has shape {key.shape} and value {value.shape}: they must be "
                "(batch, Hkv, capacity, D) and (batch, Hkv, capacity, Dv), none of them 0"
            )
        code = storage_code(key.dtype)
        if code != storage_code(value.dtype) or code < 0 or code & SWAPPED:
            raise TypeError(
                f"key has dtype {named(key.dtype)} and value {named(value.dtype)}: both must be "
                f"the same one of {', '.join(CODES)} in native byte order"
            )
        scales = []
        for name, given in (("key_scales", key_scales), ("value_scales", value_scales)):
            array = None if given is None else as_array(name, given, in_place=True)
            if (array is None) == (code == INT8) or (
                array is not None and (array.shape != key.shape[:3] or array.dtype != np.float32)
            ):
                raise ValueError(
                    f"{name} must be float32 of shape {key.shape[:3]} with int8 arrays, and None "
                    "otherwise"
                )
            scales.append(array)
        if code == BFLOAT16:  # NumPy would convert bit patterns on their way into ml_dtypes' type
            key, value = key.view(np.uint16), value.view(np.uint16)
        return cls(key, value, *scales, code=code, batch=len(key), capacity=key.shape[2],
                   fixed=True)  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a copy of another pool's state: for copy.copy, copy.deepcopy and pickle.

        All memory is new, and aligned as that of any new pool.
        """
        self.__dict__.update(state)
        for name, array in state.items():
            if isinstance(array, np.ndarray):
                copied = zeros(name, array.shape, array.dtype)
                copied[...] = array
                setattr(self, name, copied)
        self.free = self.free.copy()

    def storage(self) -> dict[str, Array]:
        """Return the arrays that hold tokens, by their names in KVCache.from_arrays."""
        arrays = {"key": self.keys, "value": self.values}
        if self.key_scales is not None and self.value_scales is not None:
            arrays |= {"key_scales": self.key_scales, "value_scales": self.value_scales}
        return arrays

    def check_writeable(self) -> None:
        """Raise if tokens can't be written, before any of them is."""
        for name, array in self.storage().items():
            if not array.flags.writeable:
                raise ValueError(f"the cache's {name} array is read-only")

    def append(
        self, sequences: Array, counts: Array, stored: list[tuple[Array, Array | None]]
    ) -> None:
        """Append rows as `rounded` returns them: `counts` of each sequence, in the order given."""
        owner = np.repeat(sequences, counts)
        first = np.repeat(self.lengths[sequences] - (np.cumsum(counts) - counts), counts)
        position = first + np.arange(len(owner))
        self.grow(sequences, counts)
        page, slot = self.table[owner, position // self.page_size], position % self.page_size
        for pages, scales, (rows, factors) in zip(
            (self.keys, self.values), (self.key_scales, self.value_scales), stored, strict=True
        ):
            pages[page, :, slot] = rows
            if scales is not None:
                scales[page, :, slot] = factors

    def append_alike(self, key: Array, value: Array) -> bool:
        """Append rows that are stored as they are, to sequences of one length; else return False.

        `append` takes 54 us for a token of one sequence, this 11 (Zen 4, busy machine).
        """
        count, begin = key.shape[2] if key.ndim == 4 else 0, int(self.lengths[:1].sum())
        keys, values = (x[:, :, begin : begin + count] for x in (self.keys, self.values))
        fits = (
            self.fixed
            and key.shape == keys.shape
            and value.shape == values.shape
            and key.dtype == value.dtype == keys.dtype
            and key.dtype.kind == "f"
            and keys.flags.writeable
            and values.flags.writeable
            and bool((self.lengths == begin).all())
            and not np.may_share_memory(value, keys)
        )
        if fits:
            keys[...], values[...] = key, value
            self.lengths = self.lengths + count
        return fits

    def grow(self, sequences: Array, counts: Array) -> None:
        """Lengthen sequences by `counts`, with pages for them; or raise and change nothing."""
        before = self.lengths[sequences]
        exceeds = counts > self.capacity - before  # a sum might wrap
        if exceeds.any():
            i = int(np.argmax(exceeds))
            raise ValueError(
                f"sequence {sequences[i]} has {before[i]} tokens, and {counts[i]} more exceed the "
                f"cache's capacity of {self.capacity}"
            )
        after = before + counts
        if not self.fixed:
            self._take_pages(sequences, before, after)
        self._set_lengths(sequences, after)

    def _take_pages(self, sequences: Array, before: Array, after: Array) -> None:
        """Take pages for new tokens; all is planned first, so too few free pages change nothing."""
        growing = after > before
        uses = self.uses.copy()
        passed = self._passed_blocks(sequences[growing], before[growing], uses)
        spare = len(self.free) + int(((uses == 0) & (self.uses > 0)).sum())
        shared = self._shared_blocks(sequences[growing], before[growing], uses)
        begin, end = -(-before // self.page_size), -(-after // self.page_size)
        needed = int((end - begin).sum()) + len(shared)
        if needed > spare:
            raise MemoryError(f"{needed} pages are needed, but {spare} of {len(uses)} are free")
        if shared:
            self.check_writeable()
        for sequence, block in passed:
            self.give_back(sequence, block, block + 1)
        for sequence, block, count in shared:
            old, new = self.table[sequence, block], self.free.pop()
            for array in self.storage().values():
                array[new, :, :count] = array[old, :, :count]
            self.uses[old] -= 1
            self.uses[new] = 1
            self.table[sequence, block] = new
        for sequence, first, last in zip(sequences, begin, end, strict=True):
            for block in range(first, last):
                page = self.free.pop()
                self.uses[page] = 1
                self.table[sequence, block] = page

    def _passed_blocks(
        self, sequences: Array, lengths: Array, uses: Array
    ) -> list[tuple[int, int]]:
        """Return the blocks that the window has left behind, and take them out of `uses`."""
        passed: list[tuple[int, int]] = []
        if self.window is None:
            return passed
        for sequence, length in zip(sequences, lengths, strict=True):
            first = max(0, int(length) - self.window) // self.page_size
            blocks = np.flatnonzero(self.table[sequence, :first] >= 0)
            passed += [(sequence, int(block)) for block in blocks]
            np.subtract.at(uses, self.table[sequence, blocks], 1)
        return passed

    def _shared_blocks(
        self, sequences: Array, lengths: Array, uses: Array
    ) -> list[tuple[int, int, int]]:
        """Return begun blocks that others have too, with their tokens; take them out of `uses`."""
        shared: list[tuple[int, int, int]] = []
        for sequence, length in zip(sequences, lengths, strict=True):
            block, count = divmod(int(length), self.page_size)
            page = self.table[sequence, block] if count else -1
            if page >= 0 and uses[page] > 1:
                uses[page] -= 1
                shared.append((sequence, block, count))
        return shared

    def give_back(self, sequence: int, start: int, stop: int | None = None) -> None:
        """Let go of the pages of a sequence's blocks; those that nobody else has become free."""
        if self.fixed:
            return
        row = self.table[sequence, start:stop]
        pages = row[row >= 0]
        self.uses[pages] -= 1
        self.free += [int(page) for page in pages if self.uses[page] == 0]
        row[:] = -1

    def views(self, sequence: int, start: int, stop: int) -> list[tuple[Array, Array]]:
        """Return the keys and values of these tokens, as one pair of views for each page."""
        pairs: list[tuple[Array, Array]] = []
        while start < stop:
            page, slot = self.table[sequence, start // self.page_size], start % self.page_size
            count = min(self.page_size - slot, stop - start)
            if page >= 0:
                tokens = (page, slice(None), slice(slot, slot + count))
                pairs.append((self.keys[tokens], self.values[tokens]))
            start += count
        return pairs

    def shorten(self, sequences: Array, lengths: Array) -> None:
        """Keep the first tokens of sequences, `lengths` of each, and give back the other pages."""
        for sequence, length in zip(sequences, lengths, strict=True):
            self.give_back(sequence, -(-int(length) // self.page_size))
        self._set_lengths(sequences, lengths)

    def reorder(self, index: Array) -> None:
        """Let sequence i become what sequence index[i] was."""
        if self.fixed:
            self._copy_tokens(index, np.arange(len(index)), int(self.lengths.max(initial=0)))
            self.lengths = self.lengths[index]
        else:
            self._adopt(self.table[index], self.lengths[index])

    def fork(self, source: int, target: int, length: int) -> None:
        """Let `target` have the first tokens of `source` in place of its own."""
        if self.fixed:
            self._copy_tokens(np.array([source]), np.array([target]), length)
            self._set_lengths(target, length)
        else:
            table, lengths = self.table.copy(), self.lengths.copy()
            table[target] = table[source]
            table[target, -(-length // self.page_size) :] = -1
            lengths[target] = length
            self._adopt(table, lengths)

    def _set_lengths(self, sequences: int | Array, lengths: int | Array) -> None:
        """Replace the lengths by others for these sequences."""
        replaced = self.lengths.copy()
        replaced[sequences] = lengths
        self.lengths = replaced

    def _adopt(self, table: Array, lengths: Array) -> None:
        """Replace table and lengths, and count uses and free pages anew."""
        uses = np.bincount(table[table >= 0], minlength=len(self.uses))
        freed = np.flatnonzero((self.uses > 0) & (uses == 0)).tolist()
        self.table, self.lengths, self.uses = table, lengths, uses
        self.free += freed

    def _copy_tokens(self, sources: Array, targets: Array, length: int) -> None:
        """Copy tokens between the sequences of a fixed pool, as if all at once."""
        moved = sources != targets
        if not moved.any():
            return
        self.check_writeable()
        arrays = self.storage().values()
        # All are read before any is written, so that a MemoryError changes nothing.
        tokens = [array[sources[moved], :, :length] for array in arrays]
        for array, rows in zip(arrays, tokens, strict=True):
            array[targets[moved], :, :length] = rows

    def check_kept(self, sequences: Array, positions: Array, lengths: Array, why: str) -> None:
        """Raise if queries from these positions on would see keys that were given back."""
        if self.window is None:
            return
        first = np.maximum(0, positions - self.window) // self.page_size
        for sequence, block, length in zip(sequences, first, lengths, strict=True):
            if (self.table[sequence, block : -(-length // self.page_size)] < 0).any():
                raise ValueError(
                    f"{why}: keys of sequence {sequence} that their window of {self.window} "
                    "would see have been given back"
                )


def zeros(name: str, shape: tuple[int, ...], dtype: Any) -> Array:
    """Return zeros that begin at a cache line: rows of whole lines are read faster."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        if size > LARGEST - 64:
            raise MemoryError
        memory = np.zeros(size + 64, np.uint8)
    except MemoryError:
        raise MemoryError(
            f"the cache's {name} of shape {shape} need {size / 2**30:.4g} GiB, which can't be "
            "allocated"
        ) from None
    start = -memory.ctypes.data % 64
    array: Array = memory[start : start + size].view(dtype).reshape(shape)
    return array
