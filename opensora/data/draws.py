"""Draw the first two numbers of many numpy generators at once.

`np.random.default_rng(seed).random()` costs tens of microseconds, nearly all of them for setting
the generator up; a table of a million rows needs millions of them an epoch. Here the same numbers
come out for a whole column of seeds. numpy promises that its seeding (SeedSequence) and PCG64 stay
as they are; a test compares them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]

_MASK = 0xFFFFFFFF
_LOW = np.uint64(_MASK)
_HALF = np.uint64(32)
#: PCG64's multiplier, high and low half.
_FACTOR = np.uint64(0x2360ED051FC65DA4), np.uint64(0x4385DF649FCCF645)


def words_of(value: int | npt.NDArray[np.int64], rows: int) -> list[U32]:
    """Return a seed as columns of 32-bit words, the low one first.

    One word where all seeds are below 2^32, else two; numpy takes no word more than a seed has, but
    words of 0 at the end mean the same to it as none.
    """
    column = np.broadcast_to(np.asarray(value, np.uint64), rows)
    low = (column & _LOW).astype(np.uint32)
    high = (column >> _HALF).astype(np.uint32)
    return [low, high] if high.any() else [low]


def first_two(seed: Sequence[U32]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return what `random()` gives first and second, for every row.

    Args:
        seed: at most four columns of words, see `words_of`.
    """
    with np.errstate(over="ignore"):
        words = _state(_pool(seed))
        # Two uint64 are one 128-bit number, the high half first; a uint64 is two words, low first.
        a, b, c, d = (_join(words[2 * i], words[2 * i + 1]) for i in range(4))
        one, top = np.uint64(1), np.uint64(63)
        step = (c << one) | (d >> top), (d << one) | one
        state = _advance(_add(step, (a, b)), step)
        numbers = []
        for _ in range(2):
            state = _advance(state, step)
            numbers.append((_output(*state) >> np.uint64(11)).astype(np.float64) * 2.0**-53)
    return numbers[0], numbers[1]


def _pool(seed: Sequence[U32]) -> list[U32]:
    """Mix a seed into four words (SeedSequence)."""
    if len(seed) > 4:
        raise ValueError(f"expected at most 4 words of seed, got {len(seed)}")
    constant = 0x43B0D7E5

    def mixed(word: U32) -> U32:
        nonlocal constant
        word = word ^ np.uint32(constant)
        constant = constant * 0x931E8875 & _MASK
        word = word * np.uint32(constant)
        return word ^ (word >> np.uint32(16))

    pool = [mixed(seed[i] if i < len(seed) else np.zeros_like(seed[0])) for i in range(4)]
    for source in range(4):
        for target in range(4):
            if source != target:
                word = pool[target] * np.uint32(0xCA01F9DD)
                word = word - mixed(pool[source]) * np.uint32(0x4973F715)
                pool[target] = word ^ (word >> np.uint32(16))
    return pool


def _state(pool: Sequence[U32]) -> list[U32]:
    """Stretch four words to the eight that a generator starts from."""
    constant, words = 0x8B51F9DD, []
    for i in range(8):
        word = pool[i % 4] ^ np.uint32(constant)
        constant = constant * 0x58F38DED & _MASK
        word = word * np.uint32(constant)
        words.append(word ^ (word >> np.uint32(16)))
    return words


def _join(low: U32, high: U32) -> U64:
    return low.astype(np.uint64) | (high.astype(np.uint64) << _HALF)


def _add(a: tuple[U64, U64], b: tuple[U64, U64]) -> tuple[U64, U64]:
    """Add 128-bit numbers (high, low)."""
    low = a[1] + b[1]
    carry: U64 = (low < a[1]).astype(np.uint64)
    high: U64 = a[0] + b[0] + carry
    return high, low


def _advance(state: tuple[U64, U64], step: tuple[U64, U64]) -> tuple[U64, U64]:
    """Return state x factor + step, modulo 2^128."""
    high, low = state
    # Low half times low half, in pieces of 32 bits.
    a, b = low >> _HALF, low & _LOW
    c, d = _FACTOR[1] >> _HALF, _FACTOR[1] & _LOW
    bottom = b * d
    middle = a * d + (bottom >> _HALF)
    cross = b * c + (middle & _LOW)
    carry = a * c + (middle >> _HALF) + (cross >> _HALF)
    product = carry + high * _FACTOR[1] + low * _FACTOR[0], low * _FACTOR[1]
    return _add(product, step)


def _output(high: U64, low: U64) -> U64:
    """Fold 128 bits to 64: xor of the halves, turned by the top six bits."""
    word, turn = high ^ low, high >> np.uint64(58)
    back: U64 = (np.uint64(64) - turn) & np.uint64(63)
    turned: U64 = np.bitwise_or(word >> turn, word << back)
    return turned
