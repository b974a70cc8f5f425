// For tests: delays a stream, so that missing waits are detected.

extern "C" __global__ void spin(i64 cycles) {
    const i64 begin = clock64();
    while (clock64() - begin < cycles) {
    }
}
