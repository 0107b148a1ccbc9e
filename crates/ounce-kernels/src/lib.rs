//! Kernels: slices in, slices out; they allocate nothing and know no graph.
