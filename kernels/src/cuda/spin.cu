// For tests: time that passes on a stream, so that what does not wait for it is seen.

extern "C" __global__ void spin(i64 cycles) {
    const i64 begin = clock64();
    while (clock64() - begin < cycles) {
    }
}
