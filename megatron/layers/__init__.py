"""The parts of a transformer, each cut over tensor-parallel ranks; each declares how its parameters are cut.

Legend of shape suffixes: b samples of a micro batch, s positions, h hidden features, p this rank's part of a
parallel dimension, n heads here, d features of a head, v vocabulary columns here.
"""
