"""`hobbit calibrate` and what it is for: thresholds, the quality curve behind `quality=`, weights of eviction rule eq. 3.

`measure.calibrate` measures, `store` is the file, `curve` what follows from the measured points, `dial` what a quality comes to.
"""
