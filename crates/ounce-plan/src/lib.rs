//! Graph, budget and machine to Plan.
