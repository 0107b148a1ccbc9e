//! Graph to Graph: differentiate, attach the optimizer, simplify.
