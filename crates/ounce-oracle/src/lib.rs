//! The slow truth, for tests only: an f64 interpreter that defines every op, finite differences, a brute-force planner.
