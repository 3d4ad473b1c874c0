// Linked after the kernels; see machine.cpp.
__thread char simt_shared_end[64] = {};
