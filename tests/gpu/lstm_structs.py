"""The structs of csrc/cuda/lstm_arguments.h, and the facts of cuda_lstm.cc."""

from __future__ import annotations

import ctypes


class CState(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("batch", ctypes.c_int64), ("unit", ctypes.c_int64)]


class CSequence(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("step", "batch", "unit")),
    ]


def _numbers(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class CShared(ctypes.Structure):
    _fields_ = [
        *_numbers(ctypes.c_int32, "steps batch units first count slice blocks"),
        *_numbers(ctypes.c_int32, "cell_activation gate_activation"),
        *_numbers(ctypes.c_int32, "reverse batch_major zero_masked_output"),
        *_numbers(ctypes.c_void_p, "offsets mask"),
        *_numbers(ctypes.c_int64, "mask_step mask_batch"),
        ("hh", ctypes.c_void_p),
        *_numbers(ctypes.c_int64, "hh_row hh_col"),
        *_numbers(CSequence, "zoneout_hidden zoneout_cell"),
        ("exchange", ctypes.c_void_p),
        ("step", ctypes.c_int32),
        ("carried", ctypes.c_void_p),
    ]


class CForward(ctypes.Structure):
    _fields_ = [
        ("shared", CShared),
        ("inputs", ctypes.c_void_p),
        ("inputs_row", ctypes.c_int64),
        *_numbers(CState, "x ih"),
        ("x_units", ctypes.c_int32),
        *_numbers(ctypes.c_void_p, "bias_ih bias_hh"),
        *_numbers(ctypes.c_int64, "bias_ih_stride bias_hh_stride"),
        ("output", CSequence),
        *_numbers(CState, "initial_h initial_c final_h final_c"),
        *_numbers(ctypes.c_void_p, "gates cells hidden"),
        *_numbers(ctypes.c_int64, "gates_row cells_row hidden_row"),
    ]


class CBackward(ctypes.Structure):
    _fields_ = [
        ("shared", CShared),
        *_numbers(ctypes.c_void_p, "gates cells"),
        *_numbers(ctypes.c_int64, "gates_row cells_row cells_unit"),
        ("grad_output", CSequence),
        *_numbers(CState, "grad_final_h grad_final_c grad_initial_h grad_initial_c"),
        *_numbers(ctypes.c_void_p, "grad_gates grad_bias"),
        ("grad_biases", CState * 2),
    ]


class COffsets(ctypes.Structure):
    _fields_ = [
        ("to", ctypes.c_void_p),
        ("count", ctypes.c_int32),
        ("numbers", ctypes.c_int32 * 512),
    ]


class CFacts(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        *_numbers(ctypes.c_int32, "threads units width chunk slice depth reach kept arguments"),
    ]
