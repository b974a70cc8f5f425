// Makes CUDA C++ compile as host C++; included before a kernel's text.
#pragma once
#include "types.h"
#include "access.h"
#include "fibers.h"
#include "launch.h"
#include "math.h"
#include "device.h"
