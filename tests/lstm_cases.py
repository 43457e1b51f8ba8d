"""The one table of LSTM cases that the core, torch and TensorFlow are all tested with.

`tests.lstm_problem` says what a case is, and makes arrays and references of it. LAYERS runs over
sequences, CELLS are single steps; CASES is both, and ONE_BIAS all of them with one bias or none.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tests.lstm_pairs import OPTIONS, pairs
from tests.lstm_problem import (
    LstmCase,
    LstmProblem,
    assert_close,
    build,
    computed,
    reference,
    relaid,
    rival,
)
from tests.lstm_reference import ACTIVATIONS

__all__ = [
    "BY_ID",
    "CASES",
    "CELLS",
    "LAYERS",
    "ONE_BIAS",
    "OPTIONS",
    "LstmCase",
    "LstmProblem",
    "assert_close",
    "build",
    "computed",
    "reference",
    "relaid",
    "rival",
]


def _case(id: str, *sizes: int, **options: Any) -> LstmCase:
    """Steps, batch, inputs, units."""
    return LstmCase(id, *sizes, **options)


KERAS = {"weight_layout": "transposed", "bias": "one", "batch_first": True}

LAYERS = (
    # Smallest and empty shapes.
    _case("one_element", 1, 1, 1, 1),
    _case("no_steps", 0, 3, 5, 4),
    _case("no_steps_no_state", 0, 3, 5, 4, initial="none", projection=2, peephole=True),
    _case("no_batch", 3, 0, 5, 4),
    _case("no_batch_packed_order", 3, 0, 5, 4, batch_first=True, projection=2),
    _case("one_step", 1, 3, 5, 17),
    _case("one_sequence", 6, 1, 5, 17),
    _case("one_unit", 4, 3, 5, 1),
    _case("one_input", 4, 3, 1, 3),
    _case("one_input_one_unit", 7, 2, 1, 1, reverse=True),
    # On and beside the multiples of vector widths, register tiles and reduction runs.
    _case("three_units", 4, 2, 5, 3),
    _case("below_vector", 3, 5, 5, 15),
    _case("at_vector", 3, 4, 64, 16),
    _case("above_vector", 4, 3, 5, 17),
    _case("at_tile", 3, 8, 64, 64),
    _case("above_tile", 3, 7, 64, 65),
    _case("digits", 4, 16, 28, 128),
    _case("odd_everywhere", 3, 13, 131, 130),
    _case("deep_inputs", 2, 3, 1030, 9),
    _case("many_sequences", 2, 150, 5, 17),
    _case("many_steps", 70, 2, 5, 17),
    _case("one_sequence_of_many", 9, 1, 131, 128),
    _case("long", 2000, 2, 3, 5),
    _case("long_one_sequence_reverse", 300, 1, 1, 3, reverse=True),
    # More rows than gradients of gates are kept for at once.
    _case("blocks", 43, 60, 5, 9, projection=4),
    _case("blocks_extras", 40, 29, 5, 9, peephole=True, zoneout="draws", mask="interior",
          batch_first=True, reverse=True),
    _case("blocks_of_one_step", 3, 700, 5, 3, initial="none", batch_first=True, bias="one"),
    _case("blocks_norm_dropout", 12, 100, 6, 9, projection=4, norm=True, dropout="both",
          input_layout="strided", weight_layout="transposed", peephole=True),
    _case("blocks_packed", 60, 30, 5, 9, lengths=(60,) * 9 + (41,) * 10 + (30,) * 6 + (7,) * 5,
          projection=4),
    _case("blocks_packed_reverse", 14, 140, 6, 9, weight_layout="strided", reverse=True, norm=True,
          dropout="both", lengths=(14,) * 60 + (9,) * 50 + (2,) * 30),
    # Biases, states, and what gradients come in.
    _case("one_bias", 4, 3, 5, 17, bias="one"),
    _case("no_bias", 4, 3, 5, 17, bias="none"),
    _case("no_state", 4, 3, 5, 17, initial="none"),
    _case("state_hidden", 4, 3, 5, 17, initial="hidden"),
    _case("state_cell", 4, 3, 5, 17, initial="cell"),
    *(
        _case(f"grad_{name}", 4, 3, 5, 7, grads=name, reverse=name == "cell")
        for name in ("output", "final", "hidden", "cell")
    ),
    _case("grad_output_no_state", 4, 3, 5, 7, grads="output", initial="none", bias="none"),
    # Layouts.
    _case("reverse", 5, 3, 5, 17, reverse=True),
    _case("batch_first", 5, 3, 5, 17, batch_first=True),
    _case("batch_first_reverse", 5, 3, 5, 17, batch_first=True, reverse=True),
    _case("keras", 5, 3, 5, 17, **KERAS),
    _case("keras_tile", 3, 7, 64, 65, **KERAS),
    _case("keras_no_bias", 5, 3, 5, 17, **{**KERAS, "bias": "none"}),
    _case("keras_go_backwards", 5, 3, 5, 17, reverse=True, **KERAS),
    *(
        _case(f"input_{way}", 4, 5, 6, 17, input_layout=way)
        for way in ("transposed", "strided", "padded", "misaligned", "overlapping")
    ),
    _case("input_same_steps", 4, 5, 6, 17, input_layout="broadcast_batch"),
    _case("input_same_rows", 4, 5, 6, 17, input_layout="broadcast_rows"),
    _case("input_same_columns", 4, 5, 6, 17, input_layout="broadcast_columns"),
    _case("batch_first_overlapping", 4, 5, 6, 17, batch_first=True, input_layout="overlapping"),
    *(
        _case(f"weight_{way}", 4, 3, 6, 17, weight_layout=way, projection=5)
        for way in ("transposed", "strided", "padded", "misaligned", "broadcast_rows")
    ),
    _case("bias_strided", 4, 3, 6, 17, bias_layout="strided", peephole=True),
    _case("bias_same", 4, 3, 6, 17, bias_layout="broadcast_columns"),
    _case("peephole_transposed", 4, 3, 6, 17, bias_layout="transposed", peephole=True),
    *(
        _case(f"state_{way}", 4, 5, 6, 17, state_layout=way)
        for way in ("transposed", "strided", "misaligned", "broadcast_rows")
    ),
    *(
        _case(f"grads_{way}", 4, 5, 6, 17, grad_layout=way)
        for way in ("transposed", "strided", "misaligned", "scalar", "broadcast_rows")
    ),
    # Packed sequences.
    *(
        _case(
            f"packed_{name}{'_reverse' if reverse else ''}",
            lengths[0], len(lengths), 5, 17, lengths=lengths, reverse=reverse, initial=initial,
        )
        for name, lengths, initial in (
            ("ones", (1, 1, 1), "both"),
            ("one_long", (9, 1, 1, 1, 1), "none"),
            ("equal", (4, 4, 4), "both"),
            ("stairs", (6, 5, 4, 3, 2, 1), "both"),
            ("one", (5,), "hidden"),
            ("pairs", (7, 7, 3, 3, 2, 2), "none"),
        )
        for reverse in (False, True)
    ),
    _case("packed_tile", 4, 20, 17, 64, lengths=(4,) * 9 + (3,) * 5 + (1,) * 6),
    _case("packed_strided", 5, 3, 6, 9, lengths=(5, 2, 1), input_layout="strided",
          grad_layout="transposed", reverse=True),
    _case("packed_zoneout_projection", 5, 3, 6, 9, lengths=(5, 2, 1), zoneout="draws",
          projection=4, reverse=True),
    # Masks.
    *(
        _case(
            f"mask_{mask}{'_reverse' if reverse else ''}{'_zero' if zero else ''}",
            6, 5, 5, 9, mask=mask, reverse=reverse, zero_masked_output=zero,
        )
        for mask in ("kept", "right", "left", "interior", "rows", "none")
        for reverse in (False, True)
        for zero in (False, True)
    ),
    *(
        _case(f"mask_{mask}_no_state", 6, 5, 5, 9, mask=mask, initial="none", **KERAS)
        for mask in ("right", "left", "interior", "rows")
    ),
    _case("mask_tile", 5, 18, 17, 64, mask="interior", batch_first=True),
    _case("mask_no_steps", 0, 3, 5, 4, mask="none"),
    _case("mask_keras_backwards", 6, 5, 5, 9, mask="interior", reverse=True, **KERAS),
    # Projections, peepholes, zoneouts.
    *(
        _case(f"projection_{n}", 4, 3, 5, 17, projection=n, initial=initial)
        for n, initial in ((1, "both"), (9, "none"), (17, "both"), (33, "both"))
    ),
    _case("projection_tile", 3, 7, 64, 130, projection=65),
    _case("projection_batch_first_reverse", 4, 3, 5, 17, projection=5, batch_first=True,
          reverse=True),
    _case("peephole", 4, 3, 5, 17, peephole=True),
    _case("peephole_tile", 3, 7, 64, 65, peephole=True, reverse=True),
    _case("peephole_projection", 4, 3, 5, 17, peephole=True, projection=5, bias="none"),
    *(
        _case(f"zoneout_{name}", 6, 3, 5, 17, zoneout=name)
        for name in ("draws", "means", "hidden", "cell")
    ),
    _case("zoneout_projection", 6, 3, 5, 17, zoneout="draws", projection=5, batch_first=True),
    _case("zoneout_mask", 6, 5, 5, 17, zoneout="means", mask="interior"),
    # Norms. What a single input gets back is a sum that cancels, but for the epsilon.
    *(
        _case(f"norm_{name}", *sizes, norm=True, norm_epsilon=1.0 if sizes[2] == 1 else 1e-3)
        for name, sizes in (
            ("one_element", (1, 1, 1, 1)), ("no_steps", (0, 3, 5, 4)), ("no_batch", (3, 0, 5, 4)),
            ("plain", (4, 3, 5, 17)), ("one_unit", (4, 3, 5, 1)), ("one_input", (4, 3, 1, 3)),
            ("at_vector", (3, 4, 64, 16)), ("at_tile", (3, 8, 64, 64)),
            ("above_tile", (3, 7, 64, 65)), ("digits", (4, 16, 28, 128)),
            ("odd_everywhere", (3, 13, 131, 130)), ("deep_inputs", (2, 3, 1030, 9)),
            ("many_sequences", (2, 150, 5, 17)), ("many_steps", (70, 2, 5, 17)),
        )
    ),
    _case("norm_one_bias", 4, 3, 5, 17, norm=True, bias="one"),
    _case("norm_no_bias", 4, 3, 5, 17, norm=True, bias="none"),
    # Nothing to normalise in the first step.
    _case("norm_no_state", 4, 3, 5, 17, norm=True, initial="none"),
    _case("norm_grad_output", 4, 3, 5, 7, norm=True, grads="output"),
    _case("norm_grad_cell", 4, 3, 5, 7, norm=True, grads="cell", reverse=True),
    _case("norm_batch_first_reverse", 5, 3, 5, 17, norm=True, batch_first=True, reverse=True),
    _case("norm_keras", 5, 3, 5, 17, norm=True, **KERAS),
    _case("norm_keras_tile", 3, 7, 64, 65, norm=True, **KERAS),
    _case("norm_strided", 4, 3, 6, 17, norm=True, bias_layout="strided", input_layout="padded"),
    _case("norm_transposed_strided", 4, 3, 6, 17, norm=True, bias_layout="transposed",
          weight_layout="strided"),
    _case("norm_same", 4, 3, 6, 17, norm=True, bias_layout="broadcast_columns"),
    _case("norm_packed", 6, 6, 5, 17, norm=True, lengths=(6, 5, 4, 3, 2, 1)),
    _case("norm_packed_reverse", 7, 4, 5, 9, norm=True, lengths=(7, 3, 3, 1), reverse=True,
          initial="none"),
    *(
        _case(f"norm_mask_{mask}", 6, 5, 5, 9, norm=True, mask=mask, reverse=mask == "interior",
              zero_masked_output=mask == "left")
        for mask in ("right", "left", "interior", "rows")
    ),
    _case("norm_projection", 4, 3, 5, 17, norm=True, projection=9),
    _case("norm_projection_tile", 3, 7, 64, 130, norm=True, projection=65, reverse=True),
    _case("norm_peephole", 4, 3, 5, 17, norm=True, peephole=True),
    _case("norm_zoneout", 6, 3, 5, 17, norm=True, zoneout="draws"),
    _case("norm_relu", 3, 2, 4, 5, norm=True, activation="relu",
          recurrent_activation="hard_sigmoid"),
    *(
        _case(f"norm_{values}", 5, 5, 6, 9, norm=True, values=values,
              norm_epsilon=1.0 if values == "tiny" else 1e-3)
        for values in ("wide", "tiny", "saturated", "large", "nonfinite")
    ),
    _case("norm_no_epsilon", 4, 3, 5, 17, norm=True, norm_epsilon=0.0),
    _case("norm_large_epsilon", 4, 3, 5, 17, norm=True, norm_epsilon=2.0),
    # Rows of equal numbers: all that is left of them are the biases.
    _case("norm_equal", 4, 3, 5, 1, norm=True, weight_layout="broadcast_rows"),
    _case("norm_equal_units", 4, 3, 5, 9, norm=True, weight_layout="broadcast_rows",
          norm_epsilon=1.0),
    # Dropout.
    *(
        _case(f"dropout_{dropout}", 4, 3, 5, 17, dropout=dropout)
        for dropout in ("both", "input", "hidden")
    ),
    *(
        _case(f"dropout_{name}", *sizes, dropout="both")
        for name, sizes in (
            ("one_element", (3, 1, 1, 1)), ("no_steps", (0, 3, 5, 4)), ("no_batch", (3, 0, 5, 4)),
            ("one_unit", (4, 3, 5, 1)), ("one_input", (4, 3, 1, 3)),
            ("at_vector", (3, 4, 64, 16)), ("at_tile", (3, 8, 64, 64)),
            ("above_tile", (3, 7, 64, 65)), ("digits", (4, 16, 28, 128)),
            ("odd_everywhere", (3, 13, 131, 130)), ("deep_inputs", (2, 3, 1030, 9)),
            ("many_sequences", (2, 150, 5, 17)), ("many_steps", (70, 2, 5, 17)),
        )
    ),
    _case("dropout_input_tile", 3, 7, 64, 65, dropout="input", bias="none"),
    _case("dropout_hidden_tile", 3, 7, 64, 65, dropout="hidden", initial="none"),
    _case("dropout_grad_output", 4, 3, 5, 7, dropout="both", grads="output", initial="none"),
    _case("dropout_grad_cell", 4, 3, 5, 7, dropout="both", grads="cell", reverse=True),
    _case("dropout_batch_first_reverse", 5, 3, 5, 17, dropout="both", batch_first=True,
          reverse=True),
    _case("dropout_keras", 5, 3, 5, 17, dropout="both", **KERAS),
    _case("dropout_keras_tile", 3, 7, 64, 65, dropout="both", **KERAS),
    *(
        _case(f"dropout_{way}", 4, 5, 6, 17, dropout="both", dropout_layout=way,
              input_layout="padded", weight_layout="transposed")
        for way in ("strided", "transposed", "misaligned", "broadcast_batch", "broadcast_rows")
    ),
    _case("dropout_weight_strided", 3, 4, 64, 16, dropout="both", weight_layout="strided"),
    _case("dropout_packed", 6, 6, 5, 17, dropout="both", lengths=(6, 5, 4, 3, 2, 1)),
    _case("dropout_packed_reverse", 7, 4, 5, 9, dropout="both", lengths=(7, 3, 3, 1),
          reverse=True, initial="none"),
    _case("dropout_packed_tile", 4, 20, 17, 64, dropout="both",
          lengths=(4,) * 9 + (3,) * 5 + (1,) * 6),
    *(
        _case(f"dropout_mask_{mask}", 6, 5, 5, 9, dropout="both", mask=mask,
              reverse=mask == "interior", zero_masked_output=mask == "left", bias="one")
        for mask in ("right", "left", "interior", "rows")
    ),
    _case("dropout_projection", 4, 3, 5, 17, dropout="both", projection=9),
    _case("dropout_projection_tile", 3, 7, 64, 130, dropout="both", projection=65, reverse=True),
    _case("dropout_peephole_zoneout", 6, 3, 5, 17, dropout="both", peephole=True, zoneout="draws"),
    *(
        _case(f"dropout_{values}", 5, 5, 6, 9, dropout="both", values=values)
        for values in ("wide", "tiny", "large", "nonfinite")
    ),
    # Both.
    *(
        _case(f"norm_dropout_{name}", *sizes, norm=True, dropout="both", **options)
        for name, sizes, options in (
            ("plain", (4, 3, 5, 17), {}), ("one_unit", (4, 3, 5, 1), {}),
            ("tile", (3, 7, 64, 65), {}), ("odd_everywhere", (3, 13, 131, 130), {}),
            ("keras", (5, 3, 5, 17), KERAS), ("packed", (5, 3, 6, 9), {"lengths": (5, 2, 1)}),
            ("mask", (6, 5, 5, 9), {"mask": "interior"}),
            ("tiny", (5, 5, 6, 9), {"values": "tiny", "norm_epsilon": 1.0}),
            ("extras", (5, 4, 5, 17), {"projection": 7, "peephole": True, "zoneout": "draws"}),
        )
    ),
    # Activations.
    *(
        _case(f"{cell}_{gate}", 3, 2, 4, 5, activation=cell, recurrent_activation=gate,
              peephole=(cell == gate))
        for cell in ACTIVATIONS for gate in ACTIVATIONS
    ),
    _case("hard_sigmoid_tile", 1, 2, 17, 33, recurrent_activation="hard_sigmoid", **KERAS),
    # Values.
    *(
        _case(f"{values}{'_extras' if peephole else ''}", 5, 5, 6, 9, values=values,
              peephole=peephole, projection=3 * peephole)
        for values in ("wide", "tiny") for peephole in (False, True)
    ),
    _case("saturated", 6, 5, 5, 9, values="saturated"),
    _case("saturated_hard", 6, 5, 5, 9, values="saturated", recurrent_activation="hard_sigmoid"),
    _case("saturated_reverse", 6, 5, 5, 17, values="saturated", reverse=True, zoneout="draws"),
    _case("large", 4, 5, 5, 9, values="large"),
    _case("nonfinite", 4, 6, 5, 9, values="nonfinite"),
    _case("nonfinite_reverse", 4, 6, 5, 17, values="nonfinite", reverse=True, batch_first=True),
    # Options together.
    *pairs(),
)  # fmt: skip


CELLS = (
    *(
        _case(f"cell_{batch}_{inputs}_{units}", 1, batch, inputs, units, cell=True)
        for batch, inputs, units in (
            (1, 1, 1), (0, 5, 4), (3, 5, 17), (1, 131, 128), (7, 64, 65), (13, 131, 130),
            (16, 64, 16), (150, 5, 3),
        )
    ),
    _case("cell_one_bias", 1, 3, 5, 17, cell=True, bias="one", weight_layout="transposed"),
    _case("cell_no_bias", 1, 3, 5, 17, cell=True, bias="none"),
    _case("cell_hidden", 1, 3, 5, 17, cell=True, grads="hidden"),
    _case("cell_cell", 1, 3, 5, 17, cell=True, grads="cell"),
    _case("cell_projection", 1, 3, 5, 17, cell=True, projection=5),
    _case("cell_projection_wide", 1, 3, 5, 17, cell=True, projection=33, peephole=True),
    _case("cell_peephole", 1, 3, 5, 17, cell=True, peephole=True),
    *(
        _case(f"cell_zoneout_{name}", 1, 5, 5, 17, cell=True, zoneout=name)
        for name in ("draws", "means", "hidden", "cell")
    ),
    *(
        _case(f"cell_{way}", 1, 5, 6, 17, cell=True, input_layout=way, state_layout=way,
              weight_layout=way, grad_layout=way)
        for way in ("transposed", "strided", "padded", "misaligned", "broadcast_rows")
    ),
    _case("cell_input_overlapping", 1, 5, 6, 17, cell=True, input_layout="overlapping"),
    *(
        _case(f"cell_{cell}_{gate}", 1, 4, 6, 9, activation=cell, recurrent_activation=gate,
              cell=True, peephole=(cell != gate))
        for cell in ACTIVATIONS for gate in ACTIVATIONS
    ),
    *(
        _case(f"cell_{name}_{batch}_{inputs}_{units}", 1, batch, inputs, units, cell=True,
              norm_epsilon=1.0 if inputs == 1 else 1e-3, **options)
        for name, options in (
            ("norm", {"norm": True}), ("dropout", {"dropout": "both"}),
            ("norm_dropout", {"norm": True, "dropout": "both"}),
        )
        for batch, inputs, units in (
            (1, 1, 1), (0, 5, 4), (3, 5, 17), (7, 64, 65), (13, 131, 130), (150, 5, 3),
        )
    ),
    *(
        _case(f"cell_norm_{way}", 1, 5, 6, 17, cell=True, norm=True, dropout="both",
              bias_layout=way, dropout_layout=way, weight_layout=way, state_layout=way)
        for way in ("transposed", "strided", "misaligned")
    ),
    _case("cell_norm_extras", 1, 3, 5, 17, cell=True, norm=True, projection=5, peephole=True,
          zoneout="draws", bias="one"),
    _case("cell_dropout_extras", 1, 3, 5, 17, cell=True, dropout="both", projection=33,
          peephole=True, zoneout="means", bias="none"),
    _case("cell_norm_hidden", 1, 3, 5, 17, cell=True, norm=True, dropout="input", grads="hidden"),
    _case("cell_norm_cell", 1, 3, 5, 17, cell=True, norm=True, dropout="hidden", grads="cell"),
    *(
        _case(f"cell_norm_{values}", 1, 5, 5, 9, cell=True, norm=True, values=values,
              norm_epsilon=1.0 if values == "tiny" else 1e-3)
        for values in ("wide", "tiny", "saturated", "large")
    ),
    *(
        _case(f"cell_{values}", 1, 5, 5, 9, cell=True, values=values)
        for values in ("wide", "tiny", "saturated", "large")
    ),
)  # fmt: skip

CASES = (*LAYERS, *CELLS)
BY_ID = {case.id: case for case in CASES}
# As TensorFlow takes them, which knows one bias.
ONE_BIAS = tuple(
    dataclasses.replace(case, bias="one") if case.bias == "both" else case for case in CASES
)
