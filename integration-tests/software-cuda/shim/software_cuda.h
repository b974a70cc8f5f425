// CUDA C++ as C++ for the host: included before a kernel's text.
#pragma once
#include "types.h"
#include "access.h"
#include "fibers.h"
#include "launch.h"
#include "math.h"
#include "device.h"
