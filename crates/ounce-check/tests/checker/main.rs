//! Tests of the checker: right plans are accepted, every broken one is rejected.

mod common;

mod defects;

mod plans;
