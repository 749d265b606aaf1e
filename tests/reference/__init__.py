"""Each method of the family written plainly a second time, to compare ours with.

The sources are the papers and their released code. Nothing here imports the product. Tensors are
float64, ``[candidate, token, channel]`` unless another shape is named. A sigma of 1 is noise and 0
is clean, a velocity is noise minus clean, and a loss is the negated objective. Loops are written
out where a formula has an index.

Where ours differs from what is published, or a test needs both, the function has a named argument
for it, whose published value is the default:

============  =======================  =======================================================
file          argument                 what ours passes, and why
============  =======================  =======================================================
neighbor      ``sum_to_one``           True: the metric's row sums to 1, its constant goes into
                                       the temperature
flow_grpo     ``between_groups``       True as published; False leaves out how the groups'
                                       means differ
              ``scale_whole_group``    True: a group beyond the limit is scaled by one factor,
                                       so that its sum stays 0
              ``exact_kl``             True for kl "gaussian": the divergence of the two
                                       Gaussians; False for "released", smaller by the step
mixgrpo       ``unbiased``             False: population deviations
              ``whole_windows``        True: the window never shrinks at the end
cocoedit      ``silent_without_core``  True: a region that erosion leaves nothing of does not
                                       count
spatialflow   ``clip_by_area``         True: the trust region of m of N tokens is sqrt(N / m)
                                       wider
edit_grpo     (all of it)              only the abstract is public; the instantiation is ours
============  =======================  =======================================================
"""
