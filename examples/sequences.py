"""Train an LSTM on sequences, natively and fused, in both frameworks from the same weights.

`lstm` reads handwritten digits row by row and tells which they are. `char_lstm` reads text and
guesses each next character: the descriptions of data sets that scikit-learn ships, under the
3-clause BSD licence like all of it. `rnn` is a recurrence that no fused kernel computes: it stays
native.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from examples import digits
from examples.comparison import parser, run
from examples.models import SEED
from examples.networks import SYMBOLS, TEXT_STEPS
from examples.training import Data

NETWORKS = ("lstm", "rnn", "char_lstm")
TEST_SHARE = 10  # one in so many pieces of text


def load_rows() -> Data:
    """The digits as eight steps, of eight pixels each."""
    return digits.load().shaped(digits.SIDE, digits.SIDE)


def read_text() -> str:
    """The descriptions, one after another; what is not ASCII is left out."""
    folder = files("sklearn.datasets.descr")
    pages = sorted((p for p in folder.iterdir() if p.name.endswith(".rst")), key=lambda p: p.name)
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    return "".join(c for c in text if c == "\n" or " " <= c <= "~")


def encode(text: str) -> NDArray[np.int64]:
    """Symbols below `SYMBOLS`: 0 for a line break, then the printable characters in their order."""
    codes = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64)
    symbols: NDArray[np.int64] = np.where(codes == ord("\n"), 0, codes - ord(" ") + 1)
    assert not len(symbols) or 0 <= symbols.min() <= symbols.max() < SYMBOLS
    return symbols


def load_text() -> Data:
    """Pieces of `TEXT_STEPS` symbols; the targets are the symbols that follow each."""
    symbols = encode(read_text())
    count = (len(symbols) - 1) // TEXT_STEPS
    inputs, targets = (
        symbols[first : first + count * TEXT_STEPS].reshape(count, TEXT_STEPS) for first in (0, 1)
    )
    order = np.random.default_rng(SEED).permutation(count)
    test, train = np.split(order, [count // TEST_SHARE])
    return Data(inputs[train], targets[train], inputs[test], targets[test])


def load_for(name: str) -> Data:
    return load_text() if name == "char_lstm" else load_rows()


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parser("sequences", __doc__, NETWORKS).parse_args(arguments)
    return run(chosen, NETWORKS, load_for, "sequences")


if __name__ == "__main__":
    sys.exit(main())
