"""Which sequence comes when: a keyed permutation per epoch and an exact interleaving of sources, in O(1) memory."""

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from math import gcd, isfinite, lcm

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

VERSION = 1  # of the order: raised when a seed comes to mean another one
ROUNDS = 6
MAX_TOTAL_WEIGHT = 2**31  # products of two counts below this fit in int64


class Permutation:
    """A permutation of range(n) picked by a key: `permutation(i)` is where position i reads, for arrays of positions.

    A Feistel network (Luby and Rackoff 1988) over the smallest power of two that holds n, its halves unequal where
    the number of bits is odd; results outside range(n) are walked on until they fall inside (Black and Rogaway 2002),
    fewer than one extra pass on average. Memory does not depend on n.
    """

    def __init__(self, n: int, key: str) -> None:
        if not 1 <= n < 2**62:
            raise ValueError(f"n must be between 1 and 2**62, got {n}")
        self.n = n
        bits = max(2, (n - 1).bit_length())
        self._low_bits = np.uint64(bits // 2)
        self._high_bits = np.uint64(bits - bits // 2)
        digest = hashlib.blake2b(key.encode(), digest_size=8 * ROUNDS).digest()
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, positions: IntArray) -> IntArray:
        """Int64 positions in range(n), any shape, to int64 indices in range(n) of the same shape."""
        out = self._network(positions.astype(np.uint64))
        outside = out >= self.n
        while outside.any():
            out[outside] = self._network(out[outside])
            outside = out >= self.n
        return out.astype(np.int64)

    def _network(self, x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        low = x & ((np.uint64(1) << self._low_bits) - np.uint64(1))
        high = x >> self._low_bits
        for i in range(0, ROUNDS, 2):
            high = high ^ _scramble(low, self._keys[i], self._high_bits)
            low = low ^ _scramble(high, self._keys[i + 1], self._low_bits)
        return (high << self._low_bits) | low


def _scramble(x: npt.NDArray[np.uint64], key: np.uint64, bits: np.uint64) -> npt.NDArray[np.uint64]:
    """The round function: `bits` well mixed bits of x and key (SplitMix64's finaliser, Steele et al. 2014)."""
    z = x ^ key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) >> (np.uint64(64) - bits)


class Interleave:
    """Gives every sample to one of k sources so that each gets its share exactly, without any randomness.

    With the weights as whole numbers W_i without common factor and D their sum, every D consecutive samples hold
    exactly W_i of source i, and any run of samples is within a few of its share. Sources are split off one after the
    other, source i taking each sample where floor(t * W_i / (W_i + ... + W_k)) steps up, t counting the samples that
    reached it: integers only, O(k) work and memory for any sample.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = whole_weights(weights)
        self._totals = [sum(self.weights[i:]) for i in range(len(self.weights))]

    def __call__(self, samples: IntArray) -> tuple[IntArray, IntArray]:
        """Int64 sample numbers (n,) to the source of each (n,) and how many samples that source had before it (n,)."""
        source = np.full(samples.shape, len(self.weights) - 1, dtype=np.int64)
        rank = samples.astype(np.int64)
        open_ = np.ones(samples.shape, dtype=bool)  # not yet taken by a source
        for i, (weight, total) in enumerate(zip(self.weights[:-1], self._totals[:-1])):
            before = _share(rank, weight, total)
            taken = open_ & (_share(rank + 1, weight, total) > before)
            rank = np.where(taken, before, np.where(open_, rank - before, rank))
            source[taken] = i
            open_ &= ~taken
        return source, rank


def _share(t: IntArray, weight: int, total: int) -> IntArray:
    """floor(t * weight / total) without overflow for t up to 2**62."""
    return (t // total) * weight + ((t % total) * weight) // total


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Positive weights as whole numbers without common factor: 0.33 and 0.67 become 33 and 67.

    Decimals are taken as written (0.1 is a tenth). Weights whose exact whole numbers would sum to more than 2**31 are
    rounded to parts of 2**30. ValueError names a weight that is not a positive finite number.
    """
    for weight in weights:
        if not isfinite(weight) or weight <= 0:
            raise ValueError(f"weight {weight}: every weight must be a positive number; leave a source of weight 0 out")
    exact = [Fraction(str(weight)) for weight in weights]
    scale = lcm(*(f.denominator for f in exact))
    whole = [int(f * scale) for f in exact]
    if sum(whole) // gcd(*whole) >= MAX_TOTAL_WEIGHT:
        whole = [max(1, round(f / sum(exact) * 2**30)) for f in exact]
    common = gcd(*whole)
    return [w // common for w in whole]
