//! What is run: Plan, Instr, buffers, certificate, and the questions a planner may ask of a machine.
