// csrc/hopper.cuh on the host runner.
#pragma once
#include "simt.h"
