"""VNN-LIB properties of networks, as a job."""
