//! The independent checker: Plan to certificate, or what is wrong with it.
