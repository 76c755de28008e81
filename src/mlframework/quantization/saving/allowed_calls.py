"""The names of what the graph of a file may call: ordinary computation on tensors whose elements lie in memory by
strides.

PyTorch has functions that trust what they are given: the indices inside of a sparse tensor, the lengths of statistics,
``unsafe`` arguments. One of these in a graph, and the graph writes anywhere in memory. So what is allowed is listed,
and whatever is new in PyTorch is not.
"""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Of each element by itself, and of pairs of elements.
_ELEMENTWISE = _names(
    """
    abs absolute acos acosh add addcdiv addcmul arccos arccosh arcsin arcsinh arctan arctan2 arctanh asin asinh atan
    atan2 atanh bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor ceil clamp
    clamp_max clamp_min clip copysign cos cosh deg2rad digamma div divide eq erf erfc erfinv exp exp2 expm1 fix
    float_power floor floor_divide fmax fmin fmod frac ge greater greater_equal gt heaviside hypot i0 ldexp le lerp
    less less_equal lgamma log log10 log1p log2 logaddexp logaddexp2 logical_and logical_not logical_or logical_xor
    logit lt masked_fill maximum minimum mul multiply nan_to_num ne neg negative not_equal positive pow rad2deg
    reciprocal relu remainder round rsqrt rsub sgn sigmoid sign signbit sin sinc sinh sqrt square sub subtract tan
    tanh true_divide trunc where xlogy isclose isfinite isin isinf isnan isneginf isposinf isreal conj conj_physical
    resolve_conj resolve_neg angle real imag
    """
)
_REDUCTIONS = _names(
    """
    all allclose amax amin aminmax any argmax argmin count_nonzero cummax cummin cumprod cumsum equal logcumsumexp
    logsumexp max mean median min mode nanmean nanmedian nansum norm prod quantile nanquantile std sum trace var
    """
)
_PRODUCTS = _names(
    """
    addbmm addmm addmv addr baddbmm bmm cross dot ger inner kron matmul mm mv outer vdot matrix_power
    """
)
_SHAPES = _names(
    """
    adjoint broadcast_to chunk clone detach diag diag_embed diagflat diagonal diff dsplit expand_as flatten flip
    fliplr flipud hsplit moveaxis movedim narrow permute ravel repeat_interleave reshape roll rot90 select split
    split_with_sizes squeeze swapaxes swapdims t tensor_split tile transpose tril triu unbind unflatten unsqueeze
    vsplit
    """
)
_BY_INDEX = _names(
    """
    argsort argwhere bincount gather histc index_add index_copy index_fill index_put index_select kthvalue
    masked_scatter masked_select msort nonzero scatter scatter_add scatter_reduce select_scatter slice_scatter sort
    take take_along_dim topk unique unique_consecutive
    """
)
_RANDOM = _names("bernoulli multinomial")
_QUERIES = _names("get_device is_complex is_conj is_floating_point is_nonzero is_same_size is_signed numel")
_COMMON = _ELEMENTWISE | _REDUCTIONS | _PRODUCTS | _SHAPES | _BY_INDEX | _RANDOM | _QUERIES | {"softmax", "log_softmax"}

FACTORIES = _names(
    """
    arange as_tensor empty empty_like eye finfo full full_like iinfo linspace logspace normal ones ones_like rand
    rand_like randint randint_like randn randn_like randperm range result_type tensor tril_indices triu_indices zeros
    zeros_like
    """
)

_ACTIVATIONS = _names(
    """
    celu elu gelu glu gumbel_softmax hardshrink hardsigmoid hardswish hardtanh leaky_relu log_softmax logsigmoid mish
    prelu relu relu6 rrelu selu sigmoid silu softmax softmin softplus softshrink softsign tanh tanhshrink threshold
    """
)
_NORMALIZATIONS = _names("batch_norm group_norm instance_norm layer_norm local_response_norm normalize rms_norm")
_DROPOUTS = _names("alpha_dropout dropout dropout1d dropout2d dropout3d feature_alpha_dropout feature_dropout")
_LAYERS = _names(
    """
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d bilinear channel_shuffle conv1d conv2d conv3d
    conv_transpose1d conv_transpose2d conv_transpose3d cosine_similarity embedding lp_pool1d lp_pool2d lp_pool3d
    max_pool1d max_pool2d max_pool3d pairwise_distance pixel_shuffle pixel_unshuffle
    """
)
_LOSSES = _names(
    """
    binary_cross_entropy binary_cross_entropy_with_logits cross_entropy huber_loss kl_div l1_loss mse_loss nll_loss
    smooth_l1_loss
    """
)
_OF_TORCH = _names(
    """
    affine_grid_generator atleast_1d atleast_2d atleast_3d block_diag broadcast_shapes broadcast_tensors bucketize
    can_cast cartesian_prod cat cdist column_stack complex concat concatenate constant_pad_nd dstack einsum fill
    grid_sampler hstack meshgrid polar promote_types row_stack scalar_tensor stack std_mean stft tensordot var_mean
    view_as_complex view_as_real vstack bartlett_window blackman_window hamming_window hann_window
    """
)
_IN_PLACE_OF_TORCH = _names("dropout_ fill_ relu_ sigmoid_ tanh_ zero_ clamp_ exp_ neg_ selu_ celu_ rrelu_ threshold_")
_OF_F = _names(
    """
    affine_grid fold grid_sample interpolate linear max_pool1d_with_indices max_pool2d_with_indices
    max_pool3d_with_indices multi_head_attention_forward one_hot pad scaled_dot_product_attention unfold upsample
    upsample_bilinear upsample_nearest celu_ elu_ hardtanh_ leaky_relu_ relu_ rrelu_ selu_ threshold_
    """
)
_OF_NN = _names(
    """
    adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d avg_pool2d avg_pool3d elu elu_
    gelu gelu_ glu hardsigmoid hardsigmoid_ hardswish hardswish_ hardtanh hardtanh_ leaky_relu leaky_relu_ linear
    log_sigmoid max_pool2d_with_indices max_pool3d_with_indices mish mish_ one_hot pad pad_sequence reflection_pad1d
    reflection_pad2d reflection_pad3d relu6 relu6_ replication_pad1d replication_pad2d replication_pad3d
    scaled_dot_product_attention silu silu_ softplus softshrink upsample_bicubic2d upsample_bilinear2d
    upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d
    """
)
_OF_SPECIAL = _names("digamma entr erf erfc erfinv exp2 expit expm1 i0 log1p log_softmax logit logsumexp ndtr round")
_OF_FFT = _names(
    "fft fft2 fftfreq fftn fftshift ifft ifft2 ifftn ifftshift irfft irfft2 irfftn rfft rfft2 rfftfreq rfftn"
)
_OF_MATH = _names(
    """
    acos acosh asin asinh atan atan2 atanh ceil copysign cos cosh degrees erf erfc exp expm1 fabs floor fmod gcd hypot
    isclose isfinite isinf isnan isqrt lcm ldexp log log10 log1p log2 pow prod radians sin sinh sqrt tan tanh trunc
    """
)

FUNCTIONS: dict[str, frozenset[str]] = {
    "torch": _COMMON | FACTORIES | _ACTIVATIONS | _NORMALIZATIONS | _DROPOUTS | _LAYERS | _LOSSES | _OF_TORCH
    | _IN_PLACE_OF_TORCH,
    "F": _ACTIVATIONS | _NORMALIZATIONS | _DROPOUTS | _LAYERS | _LOSSES | _OF_F,
    "nn": _OF_NN,
    "special": _OF_SPECIAL | {"softmax", "sinc", "xlogy", "xlog1py"},
    "linalg": _names("cross diagonal matmul matrix_norm matrix_power multi_dot norm vecdot vector_norm"),
    "fft": _OF_FFT,
    "math": _OF_MATH,
}  # fmt: skip

# They trust that the lengths which they are given multiply to no more than 64 bits hold.
WITH_WINDOWS = {
    name
    for name in _LAYERS | _OF_F | _OF_NN
    if any(part in name for part in ("pool", "pad", "fold", "conv", "upsample", "interpolate", "shuffle"))
} | {"constant_pad_nd"}

# Each has a form that writes its result into its first argument, which keeps its shape.
_WITH_FORMS_IN_PLACE = (
    _ELEMENTWISE | _names("cumprod cumsum addbmm addmm addmv addr baddbmm tril triu bernoulli")
) | _names("index_add index_copy index_fill index_put masked_scatter scatter scatter_add scatter_reduce")
_IN_PLACE = frozenset(f"{name}_" for name in _WITH_FORMS_IN_PLACE) | _names(
    "copy_ exponential_ fill_ fill_diagonal_ log_normal_ normal_ random_ uniform_ zero_"
)
_CONVERSIONS = _names(
    """
    bfloat16 bool byte cdouble cfloat char contiguous cpu cuda double float half int long short to type type_as
    """
)
_OF_TENSORS = _names(
    """
    dim dim_order element_size expand is_contiguous is_inference item ndimension nelement new_empty new_full new_ones
    new_tensor new_zeros repeat reshape_as size storage_offset stride sum_to_size tolist unfold view view_as
    """
)
METHODS = _COMMON | _CONVERSIONS | _OF_TENSORS | _IN_PLACE | _names("hardshrink prelu stft")

# Of collections: dictionaries, tuples, shapes. Tensors have no method of these names that is no computation.
METHODS_OF_OTHERS = _names("__getitem__ get items keys values index count")

# Arguments by which a call would write elsewhere, trust its caller, or call something.
REFUSED_ARGUMENTS = _names("generator key out pin_memory sorter unsafe")

# PyTorch's modules that a file makes: those whose forwards are calls of the above.
MODULES = _names(
    """
    AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d
    AlphaDropout AvgPool1d AvgPool2d AvgPool3d BatchNorm1d BatchNorm2d BatchNorm3d CELU ChannelShuffle CircularPad1d
    CircularPad2d CircularPad3d ConstantPad1d ConstantPad2d ConstantPad3d Conv1d Conv2d Conv3d ConvTranspose1d
    ConvTranspose2d ConvTranspose3d CosineSimilarity Dropout Dropout1d Dropout2d Dropout3d ELU Embedding
    FeatureAlphaDropout Flatten Fold GELU GLU GroupNorm Hardshrink Hardsigmoid Hardswish Hardtanh Identity
    InstanceNorm1d InstanceNorm2d InstanceNorm3d LPPool1d LPPool2d LPPool3d LayerNorm LeakyReLU Linear
    LocalResponseNorm LogSigmoid LogSoftmax MaxPool1d MaxPool2d MaxPool3d Mish Module ModuleDict ModuleList
    MultiheadAttention PReLU ParameterDict ParameterList PixelShuffle PixelUnshuffle RMSNorm RReLU ReLU ReLU6
    ReflectionPad1d ReflectionPad2d ReflectionPad3d ReplicationPad1d ReplicationPad2d ReplicationPad3d SELU Sequential
    SiLU Sigmoid Softmax Softmax2d Softmin Softplus Softshrink Softsign SyncBatchNorm Tanh Tanhshrink Threshold
    Unflatten Unfold Upsample UpsamplingBilinear2d UpsamplingNearest2d ZeroPad1d ZeroPad2d ZeroPad3d
    """
)
