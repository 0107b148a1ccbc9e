//! Plan to steps: the arena, dispatch to kernels, timings.
