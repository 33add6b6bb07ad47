"""Scripts to read, run and copy; they use hf_lamb only through its public names."""
