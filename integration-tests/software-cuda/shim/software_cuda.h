// Makes CUDA C++ compile as host C++. The compiler includes this file before a kernel's text.
#pragma once
#include "types.h"
#include "access.h"
#include "fibers.h"
#include "launch.h"
#include "math.h"
#include "device.h"
