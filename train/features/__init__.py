"""Features of the frozen encoders, computed once and stored beside a data set.

    DATA/features/KIND-DIGEST/features.json   all that the features depend on
    DATA/features/KIND-DIGEST/shards/         a shard for each one of the data set, committed as it
                                              is: fgid-000000.tar (KEY.npy) .parquet .json

The digest is that of features.json, so features of another encoder or resolution are in another
folder. A shard's manifest has, as the digest of its inputs, that of the data set's tar.
"""
