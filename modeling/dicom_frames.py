"""The frames of a DICOM file as arrays, their values as the standard says."""

import importlib
from typing import Any, BinaryIO

import numpy as np

from .channel_layout import UnreadableChannels, library, refuse_larger


class DicomFrames:
    """The frames of a DICOM file, `(frames, rows, columns)` and samples for colours, each read when asked for.

    Values are as DICOM's pixel transformations say (PS3.3 C.11.1 and C.11.2): rescaled by slope and intercept; of
    values without a unit the first window is taken, spread over all that can be stored, so that files with and
    without a window have one range; 0 is black; colours are RGB.
    """

    def __init__(self, file: str | BinaryIO, max_pixels: int | None = None):
        pydicom = library("pydicom")
        self.pixels, self.dataset = importlib.import_module("pydicom.pixels"), pydicom.Dataset
        self.data = pydicom.dcmread(file)
        if "PixelData" not in self.data and "FloatPixelData" not in self.data:
            raise UnreadableChannels("no pixels", "a DICOM file without pixels")
        refuse_larger(int(self.data.Rows), int(self.data.Columns), max_pixels)
        self._refuse_compression()
        first = self._frame(0)
        self.shape = (int(self.data.get("NumberOfFrames") or 1), *first.shape)
        self.dtype, self.ndim = first.dtype, 1 + first.ndim
        padding = self.data.get("PixelPaddingValue")
        # a window would show it as its lowest value, which others have as well
        known = padding not in (None, "") and first.ndim == 2 and self._window(0) is None
        self.nodata = float(self._values(np.array([padding]), 0)[0]) if known else None

    def _refuse_compression(self) -> None:
        """Raise UnreadableChannels for pixels that nothing installed can decompress."""
        syntax = self.data.file_meta.TransferSyntaxUID
        if not syntax.is_compressed:
            return
        try:
            decoder = self.pixels.get_decoder(syntax)
        except NotImplementedError:
            raise UnreadableChannels(
                "not an image", f"a DICOM file compressed as {syntax.name}, which is not read"
            ) from None
        if not decoder.is_available:
            needed = "; ".join(decoder.missing_dependencies)
            raise UnreadableChannels(
                "library", f"a DICOM file compressed as {syntax.name}, which needs one of: {needed}"
            )

    def __getitem__(self, where: tuple[Any, ...]) -> np.ndarray:
        frames = range(self.shape[0])[where[0]]
        if isinstance(frames, int):
            return self._frame(frames)[where[1:]]
        return np.stack([self._frame(one)[where[1:]] for one in frames])

    def _frame(self, index: int) -> np.ndarray:
        data = self.data
        stored = self.pixels.pixel_array(data, index=index)  # colours come as RGB
        kind = data.get("PhotometricInterpretation")
        if kind == "PALETTE COLOR":
            return self.pixels.apply_color_lut(stored, data)
        return stored if stored.ndim == 3 else self._values(stored, index)

    def _values(self, stored: np.ndarray, index: int) -> np.ndarray:
        """Return what stored numbers of a frame mean."""
        data = self.data
        rescaling = self._part("PixelValueTransformationSequence", index)
        slope, intercept = (
            default if rescaling.get(name) in (None, "") else float(rescaling.get(name))
            for name, default in (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0))
        )
        values = stored if (slope, intercept) == (1, 0) else (stored * slope + intercept).astype(np.float32)
        window = self._window(index)
        if window is not None:
            for name in ("BitsStored", "PixelRepresentation"):
                setattr(window, name, data.get(name))
            window.PhotometricInterpretation = "MONOCHROME2"
            window.RescaleSlope, window.RescaleIntercept = slope, intercept
            values = self.pixels.apply_windowing(values, window).astype(np.float32)
        if data.get("PhotometricInterpretation") == "MONOCHROME1":
            # the smallest and the largest that can be stored change places
            bits, signed = int(data.BitsStored), bool(data.PixelRepresentation)
            total = -1 if signed else 2**bits - 1
            values = (2 * intercept + total * slope - values).astype(values.dtype)
        return values

    def _part(self, sequence: str, index: int) -> Any:
        """Return where a frame's values of a kind stand: its own part, that of all frames, or the file (C.7.6.16)."""
        own = (self.data.get("PerFrameFunctionalGroupsSequence") or [])[index : index + 1]
        for groups in (*own, *(self.data.get("SharedFunctionalGroupsSequence") or [])[:1]):
            if groups.get(sequence):
                return groups.get(sequence)[0]
        return self.data

    def _window(self, index: int) -> Any:
        """Return the first window as a data set; None where there is none or values have a unit, as Hounsfield's."""
        unit = self._part("PixelValueTransformationSequence", index).get("RescaleType") or "US"
        data = self._part("FrameVOILUTSequence", index)
        united = unit != "US" or self.data.get("Modality") in ("CT", "PT", "NM")
        if united or not data.get("WindowWidth") or data.get("WindowCenter") is None:
            return None
        found = self.dataset()
        found.WindowCenter, found.WindowWidth = data.WindowCenter, data.WindowWidth
        found.VOILUTFunction = data.get("VOILUTFunction") or "LINEAR"
        return found
