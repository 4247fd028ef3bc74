//! NBD codec.
