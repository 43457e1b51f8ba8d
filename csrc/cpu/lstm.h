// The LSTM on the CPU. Equations in twinfuse/lstm.h.
#pragma once

#include "cpu/lstm_backward.h"
#include "cpu/lstm_forward.h"
