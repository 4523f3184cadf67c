"""Keyed permutations of range(n), computed one value at a time: no arrays, any n, and invertible.

A Feistel network over integers permutes without storing; hashes are splitmix64's finaliser. Each function
has a scalar form in Python integers and a vectorised one in numpy's uint64; they agree exactly.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

ROUNDS = 12
"""Four make a good shuffle of a large set; a set of three to ten samples needs twelve to show no bias."""

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(value: int) -> int:
    """A bijection of 64-bit integers whose every output bit depends on every input bit.

    The finaliser of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
    """
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)


def _mix_many(values: U64) -> U64:
    """`mix` of each element; arrays of numpy's uint64 wrap around as 64-bit arithmetic should."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_MIX_1)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_MIX_2)
    return values ^ (values >> np.uint64(31))


def fold(*parts: int) -> int:
    """A 64-bit key of several integers (each taken modulo 2^64); the order of the parts matters."""
    key = 0
    for part in parts:
        key = mix(((key ^ (part & _MASK)) + _GOLDEN) & _MASK)
    return key


def fold_many(key: int, parts: I64) -> U64:
    """`fold(..., part)` for each part, where `key` is the fold of what stands before it."""
    return _mix_many((np.uint64(key) ^ parts.astype(np.uint64)) + np.uint64(_GOLDEN))


def _side(size: int) -> int:
    """The base a of the two digits that the network permutes: the smallest even a with a * a >= size.

    Even, because with an odd base every round is an even permutation, and half of all orders of a small
    set would hardly occur.
    """
    side = math.isqrt(size - 1) + 1 if size > 1 else 1
    return side + side % 2


def permute(key: int, size: int, value: int) -> int:
    """Where the permutation number `key` of range(size) sends `value`.

    A Feistel network over pairs (left, right) of digits base a, a * a >= size: each round adds a hash
    of one digit to the other, which can be undone whatever the hash. Results in [size, a * a) walk on
    until they fall inside (cycle walking); the excess is of the order of sqrt(size), so that is rare.
    """
    side = _side(size)
    keys = [mix((key + r * _GOLDEN) & _MASK) for r in range(ROUNDS)]
    while True:
        left, right = divmod(value, side)
        for round_key in keys:
            left, right = right, (left + mix(right ^ round_key)) % side
        value = left * side + right
        if value < size:
            return value


def permute_many(keys: U64, size: int, values: I64) -> I64:
    """`permute(key, size, value)` of each pair; shapes [n] and [n]."""
    side = np.uint64(_side(size))
    result = values.astype(np.uint64)
    round_keys = [_mix_many(keys + np.uint64((r * _GOLDEN) & _MASK)) for r in range(ROUNDS)]
    todo = np.arange(len(result))
    while len(todo):
        left, right = np.divmod(result[todo], side)
        for round_key in round_keys:
            # The hash is reduced first: a sum of two digits never wraps around, a sum with the hash could.
            left, right = right, (left + _mix_many(right ^ round_key[todo]) % side) % side
        moved = left * side + right
        result[todo] = moved
        todo = todo[moved >= np.uint64(size)]
    return result.astype(np.int64)


def unpermute_many(key: int, size: int, values: I64) -> I64:
    """The inverse of `permute(key, size, .)` for each value; shape [n]."""
    side = np.uint64(_side(size))
    round_keys = [np.uint64(mix((key + r * _GOLDEN) & _MASK)) for r in range(ROUNDS)]
    result = values.astype(np.uint64)
    todo = np.arange(len(result))
    while len(todo):
        left, right = np.divmod(result[todo], side)
        for round_key in reversed(round_keys):
            left, right = (right + side - _mix_many(left ^ round_key) % side) % side, left
        moved = left * side + right
        result[todo] = moved
        todo = todo[moved >= np.uint64(size)]
    return result.astype(np.int64)
