//! What is computed: graph, ops, shapes, dtypes, parameters and stages.
